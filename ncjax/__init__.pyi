from . import metrics as metrics
from .api import train as train
from .config import Config as Config
from .data.dataset import Dataset as Dataset
from .errors import InputError as InputError
from .features.measure import measure as measure
from .features.measure import measure_batches as measure_batches
from .features.model import measure_model as measure_model
from .features.monitor import Monitor as Monitor
from .features.result import LayerMeasurements as LayerMeasurements
from .features.result import Measurement as Measurement
from .runs.load import Run as Run
from .runs.load import load_run as load_run

__version__: str
