/* The random numbers of dropout, for each file of C that drops. masks.py has the same in NumPy. */

#ifndef UNISONO_DRAW_H
#define UNISONO_DRAW_H

#include <stdint.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "words are read as four numbers of 16 bits, the lowest first"
#endif

#if defined(__x86_64__) && defined(__linux__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

enum { NUMBERS = 4 }; /* of 16 bits in a word */

/* Words `first`, `first` + 1 … of the sequence that begins at `key`: SplitMix64 (Steele, Lea, Flood: Fast Splittable
   Pseudorandom Number Generators, OOPSLA 2014). */
FOR_EACH_PROCESSOR static void draw(uint64_t key, uint64_t first, int n, uint64_t *words)
{
    for (int i = 0; i < n; i++) {
        uint64_t word = key + (first + i + 1) * 0x9E3779B97F4A7C15u;
        word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9u;
        word = (word ^ (word >> 27)) * 0x94D049BB133111EBu;
        words[i] = word ^ (word >> 31);
    }
}

#endif
