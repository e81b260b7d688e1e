// Runs every test, those of bfloat16 with each product that this machine has. See support.h.
#include <utility>

#include "../product.h"
#include "support.h"

using namespace lora_kernels;

int main() {
  tests::test_dropout();
  tests::test_operands<float>();
  tests::test_linear<float>();
  tests::test_segmented<float>();
  std::printf("masks and float32: passed\n");
  const std::pair<const char*, Bfloat16Product> products[] = {{"float", Bfloat16Product::kFloat},
                                                              {"dot", Bfloat16Product::kDot},
                                                              {"brgemm", Bfloat16Product::kBrgemm}};
  for (const auto& [name, product] : products) {
    if (!set_bfloat16_product(product)) {
      std::printf("bfloat16 by %s: not in this build, or not on this machine\n", name);
      continue;
    }
    tests::test_operands<BFloat16>();
    tests::test_linear<BFloat16>();
    tests::test_segmented<BFloat16>();
    std::printf("bfloat16 by %s: passed\n", name);
  }
}
