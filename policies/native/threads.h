// How many threads a team has. Declared here: Apple's compiler knows OpenMP's pragmas and comes without its header.
#pragma once

#ifdef _OPENMP
extern "C" int omp_get_max_threads(void);
#else
inline int omp_get_max_threads() { return 1; }
#endif
