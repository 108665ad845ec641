// The functions of OpenMP that the kernels call. Not every compiler has OpenMP's own header, and
// they are PyTorch's when the library is loaded, whatever compiled it.
#pragma once

extern "C" {
int omp_get_max_threads(void);
int omp_get_num_threads(void);
int omp_get_thread_num(void);
}
