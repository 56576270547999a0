"""On the path of a Python that runs vLLM's Triton kernels by Triton's interpreter: vLLM asks whether Triton has a CPU backend."""

import triton.backends


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return True


class _Backend:
    driver, compiler = _Driver, None


triton.backends.backends.setdefault("cpu", _Backend)
