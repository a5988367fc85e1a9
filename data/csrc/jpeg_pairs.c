/*
 * The sequential Huffman decoder of libjpeg-turbo, with tables that resolve up to two whole coefficients in a look-up:
 * codes, runs and the bits of the values. It decodes most of a photograph, and leaves to the library's own decoder what
 * is near a marker or the end, and codes that are none. Pixels are the library's for any bytes; warnings are for those of
 * valid files, and may differ for broken ones.
 *
 * It stands in the place of the library's file, which it includes from the sources that the library is built from.
 */

#define jinit_huff_decoder library_jinit_huff_decoder
#include "jdhuff.c"
#undef jinit_huff_decoder

#include <stdint.h>
#include <string.h>

_Static_assert(BIT_BUF_SIZE == 64, "The library must keep as many bits as this decoder does.");

/* Bits of a look-up: tables of 8 KiB. */
#define LOOKUP_BITS 10
#define LOOKUPS (1 << LOOKUP_BITS)

/* What a symbol takes at most: a code and the bits of its value. */
#define SYMBOL_BITS 31

/* Bytes to have before a refill: as many as are loaded at once, each with a stuffed zero behind it. */
#define REFILL_BYTES (2 * sizeof(uint64_t))

/* One or two coefficients; where there is but one, the second repeats it, which saves a branch. */
typedef struct {
  int16_t first, second;
  /* Places in zigzag order, from the next one on. */
  uint8_t first_at, second_at;
  /* Bits taken. */
  uint8_t bits;
  /* Places gone ahead, beyond the last one after the end of a block. */
  uint8_t advance;
} step;

/*
 * A `second_at` that is in no block: where only the code of a coefficient is known, with its bits, the run of zeros in
 * `first_at` and the size of the value in `second`; or not even that, with no bits.
 */
#define CODE_ALONE DCTSIZE2

typedef struct {
  step steps[LOOKUPS];
} step_table;

typedef struct {
  /* First, so that a pointer to one is a pointer to the other. */
  huff_entropy_decoder library;
  step_table *tables[NUM_HUFF_TBLS];
  const step_table *table_of_block[D_MAX_BLOCKS_IN_MCU];
} pairs_decoder;

/* The next bits of the stream, leftmost first. */
typedef struct {
  const JOCTET *next, *end;
  uint64_t bits;
  int count;
} bit_reader;

static inline void drop(bit_reader *reader, int count)
{
  reader->bits <<= count;
  reader->count -= count;
}

static inline int peek(const bit_reader *reader, int count)
{
  return (int)(reader->bits >> (64 - count));
}

/* Whether a word has a byte of ones. */
static inline int has_marker_byte(uint64_t word)
{
  const uint64_t ONES = 0x0101010101010101u;
  return ((~word - ONES) & word & (ONES << 7)) != 0;
}

static inline uint64_t from_big_endian(uint64_t word)
{
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  return __builtin_bswap64(word);
#else
  return word;
#endif
}

/* Has at least `wanted` bits afterwards, of which there are 56 after a refill, or returns FALSE near a marker or the end. */
static inline boolean refill(bit_reader *reader, int wanted)
{
  uint64_t word;
  if (reader->count >= wanted)
    return TRUE;
  if ((size_t)(reader->end - reader->next) < REFILL_BYTES)
    return FALSE;
  memcpy(&word, reader->next, sizeof(word));
  if (!has_marker_byte(word)) {
    /* Bits past the counted ones are those that the next refill puts there again. */
    int bytes = (63 - reader->count) / 8;
    reader->bits |= from_big_endian(word) >> reader->count;
    reader->next += bytes;
    reader->count += 8 * bytes;
    return TRUE;
  }
  while (reader->count <= 56) {
    uint64_t byte = *reader->next++;
    if (byte == 0xff && *reader->next++ != 0)
      return FALSE;
    reader->bits |= byte << (56 - reader->count);
    reader->count += 8;
  }
  return TRUE;
}

/* The next symbol, for which there are bits; negative where the code is none. */
static inline int next_symbol(bit_reader *reader, const d_derived_tbl *table)
{
  const int known = table->lookup[peek(reader, HUFF_LOOKAHEAD)];
  int length = known >> HUFF_LOOKAHEAD;
  JLONG code;
  if (length <= HUFF_LOOKAHEAD) {
    drop(reader, length);
    return known & ((1 << HUFF_LOOKAHEAD) - 1);
  }
  while ((code = peek(reader, length)) > table->maxcode[length])
    length++;
  if (length > 16)
    return -1;
  drop(reader, length);
  return table->pub->huffval[code + table->valoffset[length]];
}

static inline int next_value(bit_reader *reader, int size)
{
  const int bits = peek(reader, size);
  drop(reader, size);
  return HUFF_EXTEND(bits, size);
}

/* The coefficients of a block after its first; FALSE where the library has to decide. */
static inline boolean decode_ac(bit_reader *reader, const step_table *steps, const d_derived_tbl *table, JCOEF *block)
{
  int k = 1;
  while (k < DCTSIZE2) {
    const step *found;
    if (!refill(reader, LOOKUP_BITS))
      return FALSE;
    found = &steps->steps[peek(reader, LOOKUP_BITS)];
    if (k + found->second_at < DCTSIZE2) {
      block[jpeg_natural_order[k + found->first_at]] = found->first;
      block[jpeg_natural_order[k + found->second_at]] = found->second;
      k += found->advance;
      drop(reader, found->bits);
    } else {
      int run, size;
      if (!refill(reader, SYMBOL_BITS))
        return FALSE;
      if (found->second_at == CODE_ALONE && found->bits != 0) {
        run = found->first_at, size = found->second;
        drop(reader, found->bits);
      } else {
        const int symbol = next_symbol(reader, table);
        if (symbol < 0)
          return FALSE;
        run = symbol >> 4, size = symbol & 15;
      }
      k += run;
      if (size != 0)
        /* The order has further entries for runs that lead out of the block. */
        block[jpeg_natural_order[k]] = next_value(reader, size);
      else if (run != 15)
        break;
      k++;
    }
  }
  return TRUE;
}

/* One MCU; FALSE, with nothing done that the library would not do again, where it has to decide. */
static boolean decode_pairs(j_decompress_ptr cinfo, JBLOCKROW *MCU_data)
{
  pairs_decoder *decoder = (pairs_decoder *)cinfo->entropy;
  huff_entropy_decoder *library = &decoder->library;
  savable_state state = library->saved;
  const int kept = library->bitstate.bits_left;
  bit_reader reader = { cinfo->src->next_input_byte, cinfo->src->next_input_byte + cinfo->src->bytes_in_buffer,
                        kept == 0 ? 0 : (uint64_t)library->bitstate.get_buffer << (64 - kept), kept };
  JBLOCK unneeded;
  int i;

  for (i = 0; i < cinfo->blocks_in_MCU; i++) {
    const int component = cinfo->MCU_membership[i];
    JCOEF *block = MCU_data == NULL ? unneeded : *MCU_data[i];
    int size, difference = 0;
    if (!refill(&reader, SYMBOL_BITS) || (size = next_symbol(&reader, library->dc_cur_tbls[i])) < 0)
      return FALSE;
    if (size != 0)
      difference = next_value(&reader, size);
    if (library->dc_needed[i]) {
      /* Wraps, as the library's does, where a file is broken. */
      state.last_dc_val[component] = (int)((unsigned)state.last_dc_val[component] + (unsigned)difference);
      block[0] = (JCOEF)state.last_dc_val[component];
    }
    if (!decode_ac(&reader, decoder->table_of_block[i], library->ac_cur_tbls[i], library->ac_needed[i] ? block : unneeded))
      return FALSE;
  }

  cinfo->src->bytes_in_buffer = reader.end - reader.next;
  cinfo->src->next_input_byte = reader.next;
  library->bitstate.bits_left = reader.count;
  library->bitstate.get_buffer = reader.count == 0 ? 0 : reader.bits >> (64 - reader.count);
  library->saved = state;
  return TRUE;
}

METHODDEF(boolean)
decode_mcu_by_pairs(j_decompress_ptr cinfo, JBLOCKROW *MCU_data)
{
  huff_entropy_ptr library = (huff_entropy_ptr)cinfo->entropy;
  const boolean has_restarts = cinfo->restart_interval != 0;
  const boolean is_plain = !library->pub.insufficient_data && cinfo->unread_marker == 0 &&
                           !(has_restarts && library->restarts_to_go == 0);
  if (!is_plain || !decode_pairs(cinfo, MCU_data))
    return decode_mcu(cinfo, MCU_data);
  if (has_restarts)
    library->restarts_to_go--;
  return TRUE;
}

/*
 * What single coefficients and the end of a block begin with. Codes in their order lead to table entries in theirs (annex C
 * of T.81), all with the values that come after a code.
 */
static void fill_singles(step *singles, const JHUFF_TBL *codes)
{
  const UINT8 *symbol = codes->huffval;
  int length, i, value, copies, filled = 0;
  for (length = 1; length <= LOOKUP_BITS; length++) {
    for (i = 0; i < codes->bits[length]; i++, symbol++) {
      const int run = *symbol >> 4, size = *symbol & 15, is_end = size == 0 && run != 15;
      const int is_whole = size != 0 && length + size <= LOOKUP_BITS, bits = is_whole ? length + size : length;
      for (value = 0; value < (is_whole ? 1 << size : 1); value++) {
        /* At the end a zero goes to a place that has no value yet. */
        const step made = is_whole ? (step){ HUFF_EXTEND(value, size), HUFF_EXTEND(value, size), run, run, bits, run + 1 }
                          : is_end ? (step){ .bits = bits, .advance = DCTSIZE2 }
                                   : (step){ 0, size, run, CODE_ALONE, bits, 0 };
        for (copies = LOOKUPS >> bits; copies > 0; copies--)
          singles[filled++] = made;
      }
    }
  }
  while (filled < LOOKUPS)
    singles[filled++] = (step){ .second_at = CODE_ALONE };
}

static void fill(step_table *to, const JHUFF_TBL *codes)
{
  step singles[LOOKUPS];
  int bits;
  fill_singles(singles, codes);
  for (bits = 0; bits < LOOKUPS; bits++) {
    const step first = singles[bits], second = singles[bits << first.bits & (LOOKUPS - 1)];
    step *both = &to->steps[bits];
    *both = first;
    if (first.second_at == CODE_ALONE || first.advance == DCTSIZE2 || second.second_at == CODE_ALONE ||
        first.bits + second.bits > LOOKUP_BITS)
      continue;
    both->second = second.first;
    both->second_at = first.advance + second.first_at;
    both->bits = first.bits + second.bits;
    both->advance = first.advance + second.advance;
  }
}

METHODDEF(void)
start_pass_by_pairs(j_decompress_ptr cinfo)
{
  pairs_decoder *decoder = (pairs_decoder *)cinfo->entropy;
  boolean is_filled[NUM_HUFF_TBLS] = { FALSE };
  int i;
  start_pass_huff_decoder(cinfo);
  for (i = 0; i < cinfo->comps_in_scan; i++) {
    const int table = cinfo->cur_comp_info[i]->ac_tbl_no;
    if (is_filled[table])
      continue;
    if (decoder->tables[table] == NULL)
      decoder->tables[table] = (step_table *)(*cinfo->mem->alloc_small)((j_common_ptr)cinfo, JPOOL_IMAGE,
                                                                         sizeof(step_table));
    fill(decoder->tables[table], cinfo->ac_huff_tbl_ptrs[table]);
    is_filled[table] = TRUE;
  }
  for (i = 0; i < cinfo->blocks_in_MCU; i++)
    decoder->table_of_block[i] = decoder->tables[cinfo->cur_comp_info[cinfo->MCU_membership[i]]->ac_tbl_no];
}

GLOBAL(void)
jinit_huff_decoder(j_decompress_ptr cinfo)
{
  pairs_decoder *decoder;
  library_jinit_huff_decoder(cinfo);
  decoder = (pairs_decoder *)(*cinfo->mem->alloc_small)((j_common_ptr)cinfo, JPOOL_IMAGE, sizeof(pairs_decoder));
  memset(decoder, 0, sizeof(*decoder));
  decoder->library = *(huff_entropy_ptr)cinfo->entropy;
  decoder->library.pub.start_pass = start_pass_by_pairs;
  decoder->library.pub.decode_mcu = decode_mcu_by_pairs;
  cinfo->entropy = (struct jpeg_entropy_decoder *)decoder;
}
