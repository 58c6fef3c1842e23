/* What the loop templates need of one kind of processor; included before them, once for each kind. No include
 * guard. */

/* The number of the lowest set bit; any number for 0. */
static inline int64_t PAGECORE_(first_bit)(uint64_t word)
{
#if PAGECORE_VECTORS
    return (int64_t)_tzcnt_u64(word);
#else
    return word ? __builtin_ctzll(word) : 0;
#endif
}

#if PAGECORE_VECTORS
/* The positions, from `i`, of those of eight words that are not zero; writes 8 entries, returns how many count. With
 * `pairs`: of the even words of those pairs that are not zero. */
static inline __attribute__((always_inline)) size_t PAGECORE_(append)(uint16_t *list, size_t i, __m256i low,
                                                                      __m256i high, int pairs)
{
    const __m256i zero = _mm256_setzero_si256();
    const unsigned zeros = (unsigned)_mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpeq_epi64(low, zero))) |
                           (unsigned)_mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpeq_epi64(high, zero))) << 4;
    unsigned mask = zeros ^ 255;
    if (pairs)
        mask = (mask | mask >> 1) & 0x55;
    const __m128i positions = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *)pagecore_positions[mask]));
    _mm_storeu_si128((__m128i *)list, _mm_add_epi16(positions, _mm_set1_epi16((short)i)));
    return pagecore_popcount(mask);
}

/* The edges of four words: bits that differ from the bit below. `before` holds the word before them at its top. */
static inline __m256i PAGECORE_(edges_of)(__m256i words, __m256i before)
{
    const __m256i below =
        _mm256_blend_epi32(_mm256_permute4x64_epi64(words, 0x93), _mm256_permute4x64_epi64(before, 0x93), 3);
    return _mm256_xor_si256(words, _mm256_or_si256(_mm256_add_epi64(words, words), _mm256_srli_epi64(below, 63)));
}
#endif
