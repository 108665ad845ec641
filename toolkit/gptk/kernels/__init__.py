"""gptk's own kernels for CPUs: what can be called, and whether it should be.

Before a kernel is called, `available` or one of the functions `suit…` must have said that it can
be.
"""

from gptk.kernels.attention import FEW_QUERIES as FEW_QUERIES
from gptk.kernels.attention import HEAD_DIMS as HEAD_DIMS
from gptk.kernels.attention import attend as attend
from gptk.kernels.attention import attend_causally as attend_causally
from gptk.kernels.checks import available as available
from gptk.kernels.checks import reason_against as reason_against
from gptk.kernels.checks import shims as shims
from gptk.kernels.checks import suit as suit
from gptk.kernels.checks import suit_causal_attention as suit_causal_attention
from gptk.kernels.checks import suit_cross_entropy as suit_cross_entropy
from gptk.kernels.checks import suit_gelu as suit_gelu
from gptk.kernels.checks import suit_products as suit_products
from gptk.kernels.layers import gelu as gelu
from gptk.kernels.layers import rms_norm as rms_norm
from gptk.kernels.layers import rotate as rotate
from gptk.kernels.layers import swiglu as swiglu
from gptk.kernels.products import FEW_ROWS as FEW_ROWS
from gptk.kernels.products import autocast_linear as autocast_linear
from gptk.kernels.products import column_sums as column_sums
from gptk.kernels.products import dense as dense
from gptk.kernels.products import dequantize as dequantize
from gptk.kernels.products import expand as expand
from gptk.kernels.products import linear as linear
from gptk.kernels.products import pack as pack
from gptk.kernels.products import product as product
from gptk.kernels.vocabulary import cross_entropy as cross_entropy
from gptk.kernels.vocabulary import draw as draw
from gptk.kernels.vocabulary import exponential as exponential
from gptk.kernels.vocabulary import keep_from as keep_from
from gptk.kernels.vocabulary import last_key as last_key
from gptk.kernels.vocabulary import permutation as permutation
from gptk.kernels.vocabulary import sums as sums
from gptk.kernels.vocabulary import top as top
