"""Options of a controller for elections that a test can wait for."""

QUICK_ELECTION = (
    *("--leader-elect-lease-duration", "3s", "--leader-elect-renew-deadline", "1500ms"),
    *("--leader-elect-retry-period", "500ms"),
)
