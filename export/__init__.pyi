"""The public names. `__init__.py` imports them lazily from here, so this is the only place that lists them."""

from .elastic import to_family as to_family
from .errors import DeviceError as DeviceError
from .errors import ExportError as ExportError
from .errors import MismatchError as MismatchError
from .errors import UsageError as UsageError
from .exporters import to_onnx as to_onnx
from .exporters import to_savedmodel as to_savedmodel
from .exporters import verify as verify
from .family import Family as Family
from .family import Member as Member
from .family import read_family as read_family
from .quantization.float16 import to_float16 as to_float16
from .quantization.int8 import to_int8 as to_int8
from .results import ExportResult as ExportResult
from .results import VerificationReport as VerificationReport
from .runtime.benchmark import bench as bench
from .runtime.doctor import diagnose as diagnose
from .runtime.inspection import inspect as inspect
from .runtime.prediction import predict as predict
from .runtime.sessions import session as session
