"""The passes: each file is one, and ``default`` is the pipeline that composes them."""

if __name__ != "moptrace.passes":
    raise ImportError(
        "import moptrace.passes, not passes: a second copy of every class would follow"
    )
