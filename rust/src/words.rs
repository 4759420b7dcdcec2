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
const NUMBER_BITS: u64 = 0xFFF_FFFF << NUMBER_SHIFT;
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
    fn number_of(self, key: Key) -> Option<u32> {
        let difference = (self.0 ^ key.0) | (self.1 ^ key.1) & !NUMBER_BITS;
        (difference == 0).then_some(((self.1 & NUMBER_BITS) >> NUMBER_SHIFT) as u32)
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
            slots: vec![Word::NONE; (tokens * 2).next_power_of_two().max(1024)],
            longest: 0,
        }
    }

    /// Adds the token `id` of `tokens`. Frequent ones come first: they get the
    /// better slots. Of two tokens with the same bytes the first is found.
    pub(crate) fn insert(&mut self, id: u32, tokens: &Tokens) {
        let bytes = tokens.get(id);
        self.longest = self.longest.max(bytes.len());
        let key = Key::of(bytes);
        let mut slot = self.slot(key.hash());
        while !self.slots[slot].is_none() {
            slot = (slot + 1) & (self.slots.len() - 1);
        }
        self.slots[slot] = Word::new(key, id);
    }

    #[inline(always)]
    fn slot(&self, hash: u64) -> usize {
        hash as usize & (self.slots.len() - 1)
    }

    /// Asks for the memory of a key's first slot before it is needed.
    #[inline(always)]
    pub(crate) fn prefetch(&self, hash: u64) {
        prefetch(&self.slots, self.slot(hash));
    }

    /// The id of a short key if it is in its first slot, as nearly all are.
    #[inline(always)]
    pub(crate) fn get_first(&self, key: Key, hash: u64) -> Option<u32> {
        self.slots[self.slot(hash)].number_of(key)
    }

    /// The id of a piece that is a token.
    pub(crate) fn get(&self, piece: &[u8], tokens: &Tokens) -> Option<u32> {
        if piece.len() > self.longest {
            return None;
        }
        let key = Key::of(piece);
        let mut slot = self.slot(key.hash());
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

/// What merging gave for pieces that are no tokens, within a fixed size.
///
/// `slots` are sets of four, the newest first, with a place in the ring for
/// each piece. There the ring holds the number of ids, the ids and, for a long
/// piece, its length and bytes. What is new overwrites what is oldest.
pub(crate) struct Cache {
    slots: Vec<Word>,
    used: usize, // slots that are not empty
    ring: Vec<u32>,
    head: u32, // words ever written to the ring; places count like this too
}

const WAYS: usize = 4; // four words are one cache line
const FIRST_SLOTS: usize = 1 << 11;
const MAX_SLOTS: usize = 1 << 17;
const RING: usize = 1 << 19;
/// Places have 28 bits.
const MAX_HEAD: u32 = (1 << 28) - RING as u32;

impl Cache {
    /// A full cache takes less: 2 MiB of slots, a quarter as much while it
    /// grows to that, and 2 MiB of ids.
    pub(crate) const MAX_BYTES: usize =
        MAX_SLOTS * size_of::<Word>() * 5 / 4 + RING * size_of::<u32>() + (1 << 10);

    /// An empty cache; it grows to its full size with the pieces it is given.
    pub(crate) fn new() -> Cache {
        Cache {
            slots: vec![Word::NONE; FIRST_SLOTS],
            used: 0,
            ring: Vec::new(),
            head: 0,
        }
    }

    #[inline(always)]
    fn set(&self, hash: u64) -> usize {
        (hash >> 32) as usize & (self.slots.len() - WAYS)
    }

    /// Asks for the memory of a set before it is needed.
    #[inline(always)]
    pub(crate) fn prefetch(&self, hash: u64) {
        prefetch(&self.slots, self.set(hash));
    }

    /// The ids of a piece that was inserted.
    #[inline]
    pub(crate) fn get(&self, piece: &[u8]) -> Option<&[u32]> {
        let key = Key::of(piece);
        let set = self.set(key.hash());
        let place = self.slots[set..set + WAYS].iter().find_map(|word| word.number_of(key))?;
        if self.head - place > RING as u32 {
            return None; // overwritten
        }
        let entry = &self.ring[place as usize % RING..];
        let count = entry[0] as usize;
        let (ids, rest) = entry[1..].split_at(count);
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
        if self.used * 2 > self.slots.len() && self.slots.len() < MAX_SLOTS {
            self.grow();
        }
        let long = piece.len() > KEY_BYTES;
        let len = 1 + ids.len() + if long { 1 + piece.len().div_ceil(4) } else { 0 };
        let start = self.make_room(len);
        let place = self.head;
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
        self.head += len as u32;
        self.put(Word::new(Key::of(piece), place));
    }

    fn put(&mut self, word: Word) {
        let set = self.set(word.key().hash());
        let ways = &mut self.slots[set..set + WAYS];
        let old = ways.iter().position(|w| w.is_none() || w.key() == word.key());
        let gives_way = old.unwrap_or(WAYS - 1);
        self.used += usize::from(ways[gives_way].is_none());
        ways.copy_within(..gives_way, 1);
        ways[0] = word;
    }

    fn grow(&mut self) {
        let larger = vec![Word::NONE; self.slots.len() * 4];
        let old = std::mem::replace(&mut self.slots, larger);
        self.used = 0;
        for word in old.into_iter().rev().filter(|word| !word.is_none()) {
            self.put(word);
        }
    }

    /// Where in the ring `len` words may be written, at what is then the head.
    fn make_room(&mut self, len: usize) -> usize {
        if self.ring.is_empty() {
            self.ring = vec![0; RING];
        }
        if self.head > MAX_HEAD {
            // Places would repeat, and old words point to new ids.
            self.slots.fill(Word::NONE);
            (self.used, self.head) = (0, 0);
        }
        let start = self.head as usize % RING;
        if start + len <= RING {
            return start;
        }
        self.head += (RING - start) as u32;
        0
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
fn prefetch(words: &[Word], at: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
        let word = words.as_ptr().wrapping_add(at);
        // SAFETY: SSE is part of x86-64, and a prefetch reads nothing as far as
        // the program can tell, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(word.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (words, at);
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
        let bytes = cache.slots.capacity() * size_of::<Word>() + cache.ring.capacity() * 4;
        assert!(bytes <= Cache::MAX_BYTES);
    }

    #[test]
    fn the_cache_starts_again_before_places_repeat() {
        let mut cache = Cache::new();
        cache.insert(b"old", &[1, 2]);
        cache.head = MAX_HEAD - 1;
        cache.insert(b"new", &[3, 4]);
        cache.insert(b"newer", &[5]);
        cache.insert(b"newest", &[6]);
        assert_eq!(cache.get(b"old"), None);
        assert_eq!(cache.get(b"newest"), Some(&[6][..]));
        assert!(cache.head < 100);
    }
}
