"""What every operator needs and none of them is: the one room that all operators import from.

backend     which implementation of an operator runs
mode        what is done with the tensors of a call: traced, compiled, exported, transformed, autocast
attend      softmax attention by PyTorch's fused kernels, to be differentiated in every way
twice       gradients that can be differentiated again
checks      checks of arguments, and what the Triton kernels refuse
layout      strides, channels_last, padding and cropping of maps
precision   the dtype in which sums are formed
machine     the processor and what PyTorch uses of it
tuning      which of several equal forms runs on this processor, by the clock
remembered  what earlier processes found by it
cache       how many samples a CPU takes at a time
custom_op   operators that launch kernels: on which device, on what strides
jit         Triton, imported at the first launch
rows        helpers of kernels that read and write rows
launch      what launches of Triton kernels share, and how they are listed for the compiler
flops       FLOP formulas for ``torch.utils.flop_counter``
"""
