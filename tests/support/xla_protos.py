"""Take XLA's three generated protobuf modules out of a tensorflow-cpu wheel into this environment; nothing else of it.

The Neuron SDK brings its own copies; the fake SDK needs these. Usage: python xla_protos.py WHEEL
"""

import sys
import sysconfig
import zipfile

FILES = ("xla_data_pb2.py", "service/hlo_pb2.py", "service/metrics_pb2.py")

with zipfile.ZipFile(sys.argv[1]) as wheel:
    wheel.extractall(sysconfig.get_path("purelib"), [f"tensorflow/compiler/xla/{name}" for name in FILES])
