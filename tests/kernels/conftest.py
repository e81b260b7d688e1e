"""Triton's interpreter, made faster."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    patched = set()

    def call(self, *args, **kwargs):
        """A device function. Triton would patch its own language for each call, which takes a third
        of a kernel's time; once for each module does as well, since the kernel has patched what it
        and its functions share."""
        if self.fn.__module__ not in patched:
            patched.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        function = self.rewrite()
        try:
            return function(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        """As Triton does it from 3.7 on: NumPy 2.4 makes no number of an array of one element."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch
