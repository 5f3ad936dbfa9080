/* Shared by the C files: the random numbers of dropout, the exponential, and addresses from Python. */

#ifndef UNISONO_COMMON_H
#define UNISONO_COMMON_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "words are read as four numbers of 16 bits, the lowest first"
#endif

#if defined(__x86_64__) && defined(__linux__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

#define INLINE static inline __attribute__((always_inline))

enum { NUMBERS = 4 }; /* of 16 bits in a word */

/* Words `first`, `first` + 1 … of the sequence that begins at `key`: SplitMix64 (Steele, Lea, Flood: Fast Splittable
   Pseudorandom Number Generators, OOPSLA 2014). masks.py has the same in NumPy. */
FOR_EACH_PROCESSOR static void draw(uint64_t key, uint64_t first, int n, uint64_t *words)
{
    for (int i = 0; i < n; i++) {
        uint64_t word = key + (first + i + 1) * 0x9E3779B97F4A7C15u;
        word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9u;
        word = (word ^ (word >> 27)) * 0x94D049BB133111EBu;
        words[i] = word ^ (word >> 31);
    }
}

/* exp(x) for x <= 0, as 2^n times a polynomial of the rest (Cephes, expf). */
INLINE float exponential(float x)
{
    x = x < -87.0f ? -87.0f : x;
    float twos = rintf(x * 1.44269504f);
    float rest = x - twos * 0.693359375f + twos * 2.12194440e-4f;
    float series = 1.9875691500e-4f;
    series = series * rest + 1.3981999507e-3f;
    series = series * rest + 8.3334519073e-3f;
    series = series * rest + 4.1665795894e-2f;
    series = series * rest + 1.6666665459e-1f;
    series = series * rest + 5.0000001201e-1f;
    float small = series * (rest * rest) + rest + 1.0f;
    int32_t bits = ((int32_t)twos + 127) << 23;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return small * scale;
}

INLINE float *at(unsigned long long address)
{
    return (float *)(uintptr_t)address;
}

#endif
