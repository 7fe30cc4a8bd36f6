"""What is used of transformers, for pyright.

transformers' own module takes in all of its hundreds of models, which was a sixth of the time that
checking this repository's types takes. A model of another family needs a line here.
"""

from transformers.models.clip import *
from transformers.models.gemma import *
from transformers.models.gemma2 import *
from transformers.models.qwen2 import *
from transformers.models.qwen2_5_vl import *
from transformers.models.qwen3 import *
from transformers.models.t5 import *
from transformers.tokenization_utils_base import AddedToken as AddedToken
