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
