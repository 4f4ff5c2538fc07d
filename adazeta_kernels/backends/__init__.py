"""One module (or folder) per backend. Each has `unavailable()` and `supports(op, device=, index=, dtype=)`, both giving
None or the reason why not, and functions named as the ops they implement, called with validated arguments only.

`adazeta_kernels.backends` is both this package and the public call `adazeta_kernels.backends()`: importing a subpackage
binds its name on the parent, so a function of that name would be lost on the first import of a backend.
"""

import sys
import types


class _Backends(types.ModuleType):
    def __call__(self) -> dict[str, str | None]:
        """Tell which backends can run here.

        Returns:
            Name of every known backend -> None if it can run, else the reason why not, in the order `auto` tries them.
        """
        from adazeta_kernels import dispatch

        return dispatch.report()


sys.modules[__name__].__class__ = _Backends
