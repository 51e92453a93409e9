"""The operators that the passes lower to, each with its meaning in plain PyTorch."""

if __name__ != "moptrace.kernels":
    raise ImportError(
        "import moptrace.kernels, not kernels: a second copy of every op would follow"
    )
