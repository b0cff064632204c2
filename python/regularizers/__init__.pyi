from regularizers import catalog as catalog
from regularizers import dropout as dropout
from regularizers import ops as ops
from regularizers import transport as transport
from regularizers._info import info as info
from regularizers._version import __version__ as __version__
from regularizers.backend import use_backend as use_backend
