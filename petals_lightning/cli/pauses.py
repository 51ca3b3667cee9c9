"""When a server leaves the machine to its owner: at the same hours of every day, or on a signal."""

from __future__ import annotations

import signal
from datetime import datetime, time

from petals_lightning.errors import ConfigurationError


class QuietHours:
    """Hours of every day on this machine's clock; they may go past midnight.

    Args:
        text: two times of day, e.g. `09:00-17:30` or `22:00-06:00`.

    Raises:
        ConfigurationError: it is something else, or both are the same.
    """

    def __init__(self, text: str):
        try:
            self.start, self.end = (time.fromisoformat(each.strip()) for each in text.split("-"))
        except ValueError:
            raise ConfigurationError(f"--quiet-hours {text}: must be two times of day, such as 09:00-17:30") from None
        if self.start == self.end:
            raise ConfigurationError(f"--quiet-hours {text}: must be two different times of day")

    def contain(self, now: time) -> bool:
        if self.start < self.end:
            return self.start <= now < self.end
        return now >= self.start or now < self.end


class Pause:
    """Whether the server should be paused: within quiet hours, and from SIGUSR1 until SIGUSR2.

    Args:
        quiet_hours: None for none.
    """

    def __init__(self, quiet_hours: QuietHours | None):
        self._quiet_hours = quiet_hours
        self._is_asked_for = False
        signal.signal(signal.SIGUSR1, self._on_signal)
        signal.signal(signal.SIGUSR2, self._on_signal)

    @property
    def is_wanted(self) -> bool:
        is_quiet = self._quiet_hours is not None and self._quiet_hours.contain(datetime.now().time())
        return self._is_asked_for or is_quiet

    @property
    def end(self) -> str:
        """When it ends, for people."""
        if self._is_asked_for or self._quiet_hours is None:
            return "SIGUSR2"
        return self._quiet_hours.end.isoformat("minutes" if not self._quiet_hours.end.second else "seconds")

    def _on_signal(self, number: int, frame: object) -> None:
        self._is_asked_for = number == signal.SIGUSR1
