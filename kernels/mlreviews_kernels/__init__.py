"""The attention and scan cores: tensors in, tensors out, nothing but torch imported.

Each core is a subpackage with a reference in plain PyTorch, a fast CPU path and Triton kernels, which give the same
numbers. `use_backend` and the variable ``MLREVIEWS_BACKEND`` choose between them; the default goes by device.
"""

from mlreviews_kernels.backends import BackendError, use_backend

__all__ = ["BackendError", "use_backend"]
