"""No dependency reports anything to anyone: they read these when they are imported, or started."""

import os

SETTINGS = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
for _name, _value in SETTINGS.items():
    os.environ.setdefault(_name, _value)
