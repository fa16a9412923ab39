"""What we use of tensorboardX, which imports torch wherever that is installed, for methods that we do not call: two
seconds and 200 MB of every start."""

import sys

_HIDDEN = "torch" not in sys.modules
if _HIDDEN:
    sys.modules["torch"] = None  # "not there", to an import
try:
    from tensorboardX import summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
finally:
    if _HIDDEN:
        del sys.modules["torch"]

__all__ = ["Event", "EventsWriter", "SessionLog", "summary"]
