"""Do I need ARL? ``diagnose(factory, train_loader, val_loader)`` trains the user's own model in a few ways
and says.

On the command line: ``python -m arl_fast.diagnose module:task``, see ``--help``.
"""

from .run import Diagnosis, diagnose
from .verdict import Verdict, decide

__all__ = ["Diagnosis", "Verdict", "decide", "diagnose"]
