//! Pieces that were encoded before: the vocabulary itself, and a cache.
//!
//! [`Words`] is filled once, from the tokens that their own bytes encode to,
//! and then only read, so all threads share it. [`Cache`] holds what merging
//! gave for other pieces; a call borrows one for its time, so it is never
//! contended. Its size is fixed ([`Cache::MAX_BYTES`]): a new piece replaces an
//! old one, and hostile text can make it useless but not large.
//!
//! A piece of at most 12 bytes is a [`Key`]: its bytes in two words with the
//! length in the last four bits. It is compared and hashed without touching
//! memory, and leaves room for the id of a token, so that four tokens fit a
//! cache line. Called by `encode` only.

use std::hash::Hasher;

use rustc_hash::FxHasher;

use crate::decode::Tokens;

/// Pieces up to this many bytes fit a [`Key`].
pub(crate) const KEY_BYTES: usize = 12;
/// Pieces up to this many bytes are remembered.
pub(crate) const CACHED_BYTES: usize = 128;

/// A short piece: its bytes, zeros, and its length in the last four bits. Of a
/// longer piece a hash instead, so that the bytes must be compared as well.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Key(u64, u64);

/// `MASKS[n]` keeps the first n of 12 bytes; one more, for longer pieces.
const MASKS: [(u64, u64); 16] = {
    let mut masks = [(0, 0); 16];
    let mut n = 1;
    while n <= KEY_BYTES {
        let all = u128::MAX >> (128 - 8 * n);
        masks[n] = (all as u64, (all >> 64) as u64);
        n += 1;
    }
    masks
};
/// Above the bytes, below the length: bits that are 0 in every key.
const NUMBER_SHIFT: u32 = 32;
const NUMBER_MASK: u32 = 0xFFF_FFFF;
const NUMBER_BITS: u64 = (NUMBER_MASK as u64) << NUMBER_SHIFT;
/// In place of a length: the key is that of a long piece.
const LONG: u64 = 14;

impl Key {
    /// The key of a piece of at most 12 bytes; for more, a key like no other.
    pub(crate) fn new(piece: &[u8]) -> Key {
        let mut bytes = [0; 16];
        let len = piece.len().min(KEY_BYTES + 1);
        if len <= KEY_BYTES {
            bytes[..len].copy_from_slice(piece);
        }
        let all = u128::from_le_bytes(bytes);
        Key(all as u64, (all >> 64) as u64 | (len as u64) << 60)
    }

    /// [`Key::new`] of `text[start..start + len]`, by wide loads.
    ///
    /// # Safety
    ///
    /// `text` goes on for 12 bytes from `start`.
    #[inline(always)]
    pub(crate) unsafe fn at(text: &[u8], start: usize, len: usize) -> Key {
        debug_assert!(start + KEY_BYTES <= text.len());
        // SAFETY: these are the 12 bytes that the caller vouches for, and the
        // reads ask for no alignment.
        let (low, high) = unsafe {
            let from = text.as_ptr().add(start);
            let low = from.cast::<u64>().read_unaligned();
            (low, from.add(8).cast::<u32>().read_unaligned())
        };
        let len = len.min(KEY_BYTES + 1);
        let (low_mask, high_mask) = MASKS[len];
        let low = u64::from_le(low) & low_mask;
        let high = u64::from(u32::from_le(high)) & high_mask;
        Key(low, high | (len as u64) << 60)
    }

    /// The key of a piece of more than 12 bytes.
    fn long(piece: &[u8]) -> Key {
        let mut hasher = FxHasher::default();
        hasher.write(piece);
        let hash = hasher.finish();
        Key(hash, u64::from(hash as u32) | LONG << 60)
    }

    /// [`Key::new`] or [`Key::long`], as the piece has it.
    fn of(piece: &[u8]) -> Key {
        if piece.len() <= KEY_BYTES {
            Key::new(piece)
        } else {
            Key::long(piece)
        }
    }

    #[inline(always)]
    pub(crate) fn hash(self) -> u64 {
        let product = u128::from(self.0) * u128::from(self.1 ^ 0x9E37_79B9_7F4A_7C15);
        (product >> 64) as u64 ^ product as u64
    }
}

/// A piece with a number of 28 bits: the id of a token, or a place in the ring.
#[derive(Clone, Copy)]
#[repr(C, align(16))]
struct Word(u64, u64);

impl Word {
    const NONE: Word = Word(0, 0);

    fn new(key: Key, number: u32) -> Word {
        Word(key.0, key.1 | u64::from(number) << NUMBER_SHIFT)
    }

    fn is_none(self) -> bool {
        self.1 == 0
    }

    fn key(self) -> Key {
        Key(self.0, self.1 & !NUMBER_BITS)
    }

    #[inline(always)]
    fn is(self, key: Key) -> bool {
        (self.0 ^ key.0) | (self.1 ^ key.1) & !NUMBER_BITS == 0
    }

    #[inline(always)]
    fn number_of(self, key: Key) -> Option<u32> {
        let number = (self.1 >> NUMBER_SHIFT) as u32 & NUMBER_MASK;
        self.is(key).then_some(number)
    }
}

/// The tokens that their own bytes encode to, by their bytes.
pub(crate) struct Words {
    slots: Vec<Word>, // at most half full; a power of two
    longest: usize,
}

impl Words {
    /// A table with room for `tokens` tokens.
    pub(crate) fn new(tokens: usize) -> Words {
        Words {
            slots: vec![Word::NONE; (tokens * 2).next_power_of_two()],
            longest: 0,
        }
    }

    /// Adds the token `id` of `tokens`. Of two with the same bytes the first is
    /// found.
    pub(crate) fn insert(&mut self, id: u32, tokens: &Tokens) {
        let bytes = tokens.get(id);
        self.longest = self.longest.max(bytes.len());
        let key = Key::of(bytes);
        let mut slot = key.hash() as usize & (self.slots.len() - 1);
        while !self.slots[slot].is_none() {
            slot = (slot + 1) & (self.slots.len() - 1);
        }
        self.slots[slot] = Word::new(key, id);
    }

    /// The id of a piece that is a token.
    pub(crate) fn get(&self, piece: &[u8], tokens: &Tokens) -> Option<u32> {
        if piece.len() > self.longest {
            return None;
        }
        let key = Key::of(piece);
        let mut slot = key.hash() as usize & (self.slots.len() - 1);
        while !self.slots[slot].is_none() {
            if let Some(id) = self.slots[slot].number_of(key) {
                if piece.len() <= KEY_BYTES || tokens.get(id) == piece {
                    return Some(id);
                }
            }
            slot = (slot + 1) & (self.slots.len() - 1);
        }
        None
    }
}

/// The ids of pieces met before, within a fixed size.
///
/// A short piece with up to four ids has them beside its word, in the same
/// cache line. Of any other piece the word has a place in the ring, where there
/// is the number of ids, the ids and, for a long piece, its length and bytes;
/// what is new overwrites what is oldest.
pub(crate) struct Cache {
    lines: Vec<Line>,
    used: usize, // words that are not empty
    turn: usize, // which word of a full line gives way next
    ring: Vec<u32>,
    head: u32, // numbers ever written to the ring; places count like this too
}

const WAYS: usize = 2;

/// One cache line: two words and their ids.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line {
    words: [Word; WAYS],
    ids: [[u32; INLINE]; WAYS],
}

/// Ids kept beside the word; its number is how many.
pub(crate) const INLINE: usize = 4;
/// Added to places in the ring, to tell them from a count.
const PLACE: u32 = 8;
const FIRST_LINES: usize = 1 << 9;
const MAX_LINES: usize = 1 << 16;
const RING: usize = 1 << 18;
/// Places have 28 bits.
const MAX_HEAD: u32 = (1 << 28) - 2 * RING as u32;
const NO_LINE: Line = Line {
    words: [Word::NONE; WAYS],
    ids: [[0; INLINE]; WAYS],
};

impl Cache {
    /// A full cache takes less: 4 MiB of lines, a quarter as much while it
    /// grows to that, and 1 MiB of ring.
    pub(crate) const MAX_BYTES: usize =
        MAX_LINES * size_of::<Line>() * 5 / 4 + RING * size_of::<u32>() + (1 << 10);

    /// An empty cache; it grows to its full size with the pieces it is given.
    pub(crate) fn new() -> Cache {
        Cache {
            lines: vec![NO_LINE; FIRST_LINES],
            used: 0,
            turn: 0,
            ring: Vec::new(),
            head: 0,
        }
    }

    #[inline(always)]
    fn at(&self, hash: u64) -> usize {
        hash as usize & (self.lines.len() - 1)
    }

    /// Asks for the memory of a key's line before it is needed.
    #[inline(always)]
    pub(crate) fn prefetch(&self, hash: u64) {
        prefetch(&self.lines, self.at(hash));
    }

    /// The ids of a short key and their number, or a number above [`INLINE`]
    /// where they are not beside it. No branch depends on where they are.
    #[inline(always)]
    pub(crate) fn get_first(&self, key: Key, hash: u64) -> (&[u32; INLINE], usize) {
        let Line { words: [a, b], ids } = &self.lines[self.at(hash)];
        let (is_a, is_b) = (a.is(key), b.is(key));
        let mask = u64::from(is_a).wrapping_neg();
        let word = a.1 & mask | b.1 & !mask;
        let number = (word >> NUMBER_SHIFT) as u32 & NUMBER_MASK;
        let none = u32::from(is_a | is_b).wrapping_sub(1);
        (&ids[usize::from(!is_a)], (number | none) as usize)
    }

    /// The ids of a piece that was inserted.
    pub(crate) fn get(&self, piece: &[u8]) -> Option<&[u32]> {
        let key = Key::of(piece);
        let first = self.at(key.hash());
        // A piece that found its line full may be in the one beside it.
        for at in [first, first ^ 1] {
            let line = &self.lines[at];
            for (word, ids) in line.words.iter().zip(&line.ids) {
                match word.number_of(key) {
                    Some(count) if count as usize <= INLINE => return Some(&ids[..count as usize]),
                    Some(number) => return self.in_ring(number - PLACE, piece),
                    None => {}
                }
            }
        }
        None
    }

    fn in_ring(&self, place: u32, piece: &[u8]) -> Option<&[u32]> {
        if self.head - place > RING as u32 {
            return None; // overwritten
        }
        let entry = &self.ring[place as usize % RING..];
        let (ids, rest) = entry[1..].split_at(entry[0] as usize);
        if piece.len() > KEY_BYTES {
            let same_len = rest[0] as usize == piece.len();
            if !same_len || !words(piece).zip(&rest[1..]).all(|(a, &b)| a == b) {
                return None;
            }
        }
        Some(ids)
    }

    /// Remembers the ids of a piece of at most [`CACHED_BYTES`].
    pub(crate) fn insert(&mut self, piece: &[u8], ids: &[u32]) {
        if self.used * 2 > self.lines.len() * WAYS && self.lines.len() < MAX_LINES {
            self.grow();
        }
        let key = Key::of(piece);
        let mut inline = [0; INLINE];
        let number = if piece.len() <= KEY_BYTES && ids.len() <= INLINE {
            inline[..ids.len()].copy_from_slice(ids);
            ids.len() as u32
        } else {
            self.write_to_ring(piece, ids) + PLACE
        };
        self.put(Word::new(key, number), inline);
    }

    fn put(&mut self, word: Word, ids: [u32; INLINE]) {
        let first = self.at(word.key().hash());
        let free = |at: usize| {
            let mut words = self.lines[at].words.iter();
            let way = words.position(|old| old.is_none() || old.key() == word.key());
            way.map(|way| (at, way))
        };
        // In a full line any word gives way: the oldest would be the worst
        // choice for a text that is read again and again.
        let (at, way) = free(first).or_else(|| free(first ^ 1)).unwrap_or_else(|| {
            self.turn = self.turn.wrapping_add(1);
            (first, self.turn % WAYS)
        });
        let line = &mut self.lines[at];
        self.used += usize::from(line.words[way].is_none());
        line.words[way] = word;
        line.ids[way] = ids;
    }

    fn grow(&mut self) {
        let larger = vec![NO_LINE; self.lines.len() * 4];
        self.used = 0;
        for line in std::mem::replace(&mut self.lines, larger) {
            for (word, ids) in line.words.into_iter().zip(line.ids) {
                if !word.is_none() {
                    self.put(word, ids);
                }
            }
        }
    }

    /// The place of a new entry of the ring.
    fn write_to_ring(&mut self, piece: &[u8], ids: &[u32]) -> u32 {
        if self.ring.is_empty() {
            self.ring = vec![0; RING];
        }
        if self.head > MAX_HEAD {
            // Places would repeat, and old words point to new ids.
            self.lines.fill(NO_LINE);
            (self.used, self.head) = (0, 0);
        }
        let long = piece.len() > KEY_BYTES;
        let len = 1 + ids.len() + if long { 1 + piece.len().div_ceil(4) } else { 0 };
        let mut start = self.head as usize % RING;
        if start + len > RING {
            self.head += (RING - start) as u32;
            start = 0;
        }
        let entry = &mut self.ring[start..start + len];
        entry[0] = ids.len() as u32;
        entry[1..=ids.len()].copy_from_slice(ids);
        if long {
            let rest = &mut entry[1 + ids.len()..];
            rest[0] = piece.len() as u32;
            for (to, from) in rest[1..].iter_mut().zip(words(piece)) {
                *to = from;
            }
        }
        let place = self.head;
        self.head += len as u32;
        place
    }
}

/// The bytes of a piece as words, the last one filled up with zeros.
fn words(piece: &[u8]) -> impl Iterator<Item = u32> + '_ {
    piece.chunks(4).map(|chunk| {
        let mut word = [0; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        u32::from_le_bytes(word)
    })
}

#[inline(always)]
fn prefetch<T>(lines: &[T], at: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
        let line = lines.as_ptr().wrapping_add(at);
        // SAFETY: SSE is part of x86-64, and a prefetch reads nothing as far as
        // the program can tell, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (lines, at);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

        #[test]
        fn wide_loads_give_the_same_key(
            text in prop::collection::vec(any::<u8>(), 12..40),
            start in 0usize..28,
            len in 1usize..28,
        ) {
            let start = start.min(text.len() - KEY_BYTES);
            let len = len.min(text.len() - start);
            // SAFETY: `start` is at least 12 bytes before the end.
            let key = unsafe { Key::at(&text, start, len) };
            prop_assert_eq!(key, Key::new(&text[start..start + len]));
        }

        #[test]
        fn keys_are_as_different_as_pieces(
            a in prop::collection::vec(0u8..3, 1..13),
            b in prop::collection::vec(0u8..3, 1..13),
        ) {
            prop_assert_eq!(Key::new(&a) == Key::new(&b), a == b);
            prop_assert_eq!(Word::new(Key::new(&a), 7).number_of(Key::new(&b)).is_some(), a == b);
        }
    }

    /// Ids that tell which piece they belong to.
    fn ids_of(piece: &[u8]) -> Vec<u32> {
        piece.iter().map(|&b| u32::from(b)).chain([piece.len() as u32]).collect()
    }

    #[test]
    fn the_cache_forgets_but_never_errs_and_never_grows_further() {
        let mut cache = Cache::new();
        let mut known = 0;
        for i in 0..600_000u32 {
            let text = format!("{i:x}");
            let piece = if i % 3 == 0 { text.repeat(3) } else { text };
            cache.insert(piece.as_bytes(), &ids_of(piece.as_bytes()));
            assert_eq!(cache.get(piece.as_bytes()), Some(&*ids_of(piece.as_bytes())));
            let earlier = format!("{:x}", i / 2);
            if let Some(ids) = cache.get(earlier.as_bytes()) {
                assert_eq!(ids, ids_of(earlier.as_bytes()));
                known += 1;
            }
        }
        assert!(known > 50_000, "{known}");
        let bytes = size_of_val(&*cache.lines) + size_of_val(&*cache.ring);
        assert!(bytes <= Cache::MAX_BYTES);
    }

    #[test]
    fn the_cache_starts_again_before_places_repeat() {
        let mut cache = Cache::new();
        cache.insert(b"old", &[1; 5]);
        cache.head = MAX_HEAD - 1;
        cache.insert(b"new", &[2; 5]);
        cache.insert(b"newer", &[3; 5]);
        cache.insert(b"newest", &[4; 5]);
        assert_eq!(cache.get(b"old"), None);
        assert_eq!(cache.get(b"newest"), Some(&[4; 5][..]));
        assert!(cache.head < 100);
    }
}
