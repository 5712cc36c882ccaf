import sys

from mlreviews.catalogue import CHECKOUT

assert CHECKOUT is not None
sys.path.append(str(CHECKOUT / "docs" / "generator"))
