"""The operators that the passes lower to, each with its meaning in plain PyTorch."""

if __name__ != "moptrace.kernels":
    # With the repository's root on the path, this folder is what transformers finds when it looks
    # for the package named kernels. It must look empty, and ours must not be imported twice.
    __path__ = []

    def __getattr__(name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(
            "import moptrace.kernels, not kernels: a second copy of every op would follow"
        )
