"""The two ways an evaluation can end without a report."""


class InputError(Exception):
    """The input is wrong. The message names the place, the fault and the mend; the command line exits with 2."""


class SubmissionError(Exception):
    """The submission's own code failed or hit a limit; the command line exits with 3."""
