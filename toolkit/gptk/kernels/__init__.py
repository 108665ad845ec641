"""gptk's own kernels for CPUs: which there are, and whether they can and should be run.

Before a kernel is called, `available` or one of the functions `can_run…` and `should_run…` must
have said yes. Arguments that a kernel cannot take raise TypeError or ValueError, too little memory
MemoryError.
"""

from gptk.kernels.attention import BLOCK as BLOCK
from gptk.kernels.attention import HEAD_DIMS as HEAD_DIMS
from gptk.kernels.attention import attend as attend
from gptk.kernels.attention import attend_blocks as attend_blocks
from gptk.kernels.attention import attend_causally as attend_causally
from gptk.kernels.checks import available as available
from gptk.kernels.checks import can_run as can_run
from gptk.kernels.checks import can_run_cross_entropy as can_run_cross_entropy
from gptk.kernels.checks import described as described
from gptk.kernels.checks import instructions as instructions
from gptk.kernels.checks import should_run_causal_attention as should_run_causal_attention
from gptk.kernels.checks import should_run_gelu as should_run_gelu
from gptk.kernels.checks import should_run_product as should_run_product
from gptk.kernels.checks import why_not as why_not
from gptk.kernels.compiler import FEW_QUERIES as FEW_QUERIES
from gptk.kernels.formats import FORMAT_OF_BITS as FORMAT_OF_BITS
from gptk.kernels.formats import FORMATS as FORMATS
from gptk.kernels.formats import Format as Format
from gptk.kernels.formats import packed_bytes as packed_bytes
from gptk.kernels.layers import gelu as gelu
from gptk.kernels.layers import layer_norm as layer_norm
from gptk.kernels.layers import rms_norm as rms_norm
from gptk.kernels.layers import rotate as rotate
from gptk.kernels.layers import swiglu as swiglu
from gptk.kernels.panels import PANEL as PANEL
from gptk.kernels.panels import from_panels as from_panels
from gptk.kernels.panels import linear as linear
from gptk.kernels.panels import linear_in_panels as linear_in_panels
from gptk.kernels.panels import to_panels as to_panels
from gptk.kernels.products import autocast_linear as autocast_linear
from gptk.kernels.products import column_sums as column_sums
from gptk.kernels.products import dequantize as dequantize
from gptk.kernels.products import dequantize_packed as dequantize_packed
from gptk.kernels.products import dequantize_rows as dequantize_rows
from gptk.kernels.products import pack as pack
from gptk.kernels.products import product as product
from gptk.kernels.products import quantized_linear as quantized_linear
from gptk.kernels.stored import StoredRows as StoredRows
from gptk.kernels.stored import pack_stored as pack_stored
from gptk.kernels.vocabulary import cross_entropy as cross_entropy
from gptk.kernels.vocabulary import draw as draw
from gptk.kernels.vocabulary import exponential as exponential
from gptk.kernels.vocabulary import keep_from as keep_from
from gptk.kernels.vocabulary import last_key as last_key
from gptk.kernels.vocabulary import permutation as permutation
from gptk.kernels.vocabulary import softmax_sums as softmax_sums
from gptk.kernels.vocabulary import top as top
