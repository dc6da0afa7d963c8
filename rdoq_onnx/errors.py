"""The exceptions of this package, and the exit code of each.

    RdoqError
    ├── ConfigError        2  an option or argument is wrong
    ├── ModelError         2  the model cannot be read or has nothing to quantize
    │   └── ShortageError  2  not enough memory to run it with this many samples at once
    ├── CalibrationError   2  the samples do not fit the model
    │   └── UserCodeError  2  the user's own function, which gives samples, fails
    ├── OutputError        2  the output cannot be written
    ├── ProviderError      2  ONNX Runtime or the requested provider is missing
    ├── ClusterError       2  the processes that compute for the run cannot be reached, or one of them fails
    │   └── LostError      2  the head of their cluster is gone
    ├── BudgetError        3  the budget cannot be met
    └── VerificationError  4  the emitted model fails verification or misses a gate

Messages are one line: what was found, where (file, node or option), and the fix.
"""


class RdoqError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code = 2


class ConfigError(RdoqError):
    """An option or argument is wrong."""


class ModelError(RdoqError):
    """The model cannot be read, is not valid, or has nothing to quantize."""


class ShortageError(ModelError):
    """There is not enough memory to run the model with this many samples at once."""


class CalibrationError(RdoqError):
    """The samples do not fit the model."""


class UserCodeError(CalibrationError):
    """The user's own function, which gives samples, fails; `__cause__` is its error."""


class OutputError(RdoqError):
    """The output cannot be written."""


class ProviderError(RdoqError):
    """ONNX Runtime or the requested execution provider is missing."""


class ClusterError(RdoqError):
    """The processes that compute for the run cannot be reached, or one of them fails."""


class LostError(ClusterError):
    """The head of the cluster is gone; Ray's threads may crash this process when it ends in the ordinary way."""


class BudgetError(RdoqError):
    """No choice of widths meets the budget."""

    exit_code = 3


class VerificationError(RdoqError):
    """The emitted model fails verification or misses a gate."""

    exit_code = 4
