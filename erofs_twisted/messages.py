"""Log events of a command that a person has typed, as lines on standard error."""

from __future__ import annotations

from typing import TextIO

import attrs
from twisted.logger import ILogObserver, LogEvent, LogLevel, eventAsText, formatEvent, globalLogBeginner
from zope.interface import implementer


@implementer(ILogObserver)
@attrs.frozen
class Messages:
    """Shows warnings and what is worse; with ``verbose`` all that this package says."""

    stream: TextIO
    verbose: bool = False

    def __call__(self, event: LogEvent) -> None:
        level = event.get("log_level", LogLevel.info)
        if level >= LogLevel.error:
            text = eventAsText(event, includeTimestamp=False, includeSystem=False)
            print(f"erofs-nbd: {text}", file=self.stream)
        elif level == LogLevel.warn:
            print(f"erofs-nbd: warning: {formatEvent(event)}", file=self.stream)
        elif self.verbose and str(event.get("log_namespace", "")).startswith("erofs_twisted"):
            print(formatEvent(event), file=self.stream)

    def begin(self) -> None:
        """From now on. Once a process."""
        globalLogBeginner.beginLoggingTo([self], redirectStandardIO=False)
