"""Everything wq refuses, one class a cause.

A message says what is wrong, where, the measured value, and what to do about it. Nothing but a `WqError` should reach
a user who gave bad input; the command line turns one into a single line and exit code 1.
"""


class WqError(Exception):
    """Base of every error that wq raises on purpose."""

    def __str__(self) -> str:
        return plain(super().__str__())


class SchemeError(WqError, ValueError):
    """A number of bits, group size or dtype that no scheme has."""


class GroupSizeError(SchemeError):
    """A group size that does not divide a layer's `in_features`."""


class BudgetError(WqError, ValueError):
    """A size that no mixture of widths has, or that is no size."""


class UnknownNameError(WqError, ValueError):
    """A method, format or backend that no registry knows."""


class FormatError(WqError, ValueError):
    """A checkpoint format that cannot hold the scheme or the tensors it is asked to hold."""


class ModelError(WqError):
    """A source that is no model, or a model whose structure wq cannot quantize."""


class CalibrationError(WqError):
    """Calibration text that cannot be reached, is empty, or does not fit the model."""


class TaskError(WqError):
    """A benchmark task that nobody knows, or whose harness or data are not to be had."""


class OutputError(WqError):
    """An output folder that would overwrite something or cannot be written."""


class ProcessError(WqError):
    """A run of several processes of which one has ended."""


class CheckpointError(WqError):
    """A quantized checkpoint whose tensors and config do not agree."""


class HubError(WqError):
    """An upload that the Hub refused or could not be reached for."""


def plain(text: str) -> str:
    """Without what a terminal would obey: a message may quote the name of a tensor, and that may be anything."""
    return text if text.isprintable() else "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def first_line(error: BaseException) -> str:
    """What another library said, short enough to quote."""
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
