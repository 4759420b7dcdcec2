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
    #[inline(never)]
    fn long(piece: &[u8]) -> Key {
        let mut hasher = FxHasher::default();
        hasher.write(piece);
        let hash = hasher.finish();
        Key(hash, u64::from(hash as u32) | LONG << 60)
    }

    /// [`Key::new`] or [`Key::long`], as the piece has it.
    #[inline]
    pub(crate) fn of(piece: &[u8]) -> Key {
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
    pub(crate) fn get(&self, key: Key, piece: &[u8], tokens: &Tokens) -> Option<u32> {
        if piece.len() > self.longest {
            return None;
        }
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
/// The number of a word is the id of a piece that is one token. For any other
/// piece it is a place in the ring, where there is the number of ids, the ids
/// and, for a long piece, its length and bytes; what is new overwrites what is
/// oldest.
pub(crate) struct Cache {
    pairs: Vec<Pair>,
    used: usize, // words that are not empty
    turn: usize, // which word gives way next
    ring: Vec<u32>,
    head: u32, // numbers ever written to the ring; places count like this too
}

/// Two words that are looked at together; two pairs are a cache line.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
struct Pair([Word; 2]);

const NO_PAIR: Pair = Pair([Word::NONE; 2]);
/// Added to places in the ring, to tell them from an id.
const PLACE: u32 = 1 << 21;
const FIRST_PAIRS: usize = 1 << 10;
const MAX_PAIRS: usize = 1 << 16;
const RING: usize = 1 << 19;
/// Places have 28 bits.
const MAX_HEAD: u32 = (1 << 28) - PLACE - 2 * RING as u32;
/// A piece that found its pair full is in one of those around it.
const PLACES: usize = 8;
/// Every entry of the ring may be read as if it had this many ids.
const INLINE: usize = 4;

/// What the cache knows of a piece at first sight.
pub(crate) enum Found<'a> {
    /// It is a token.
    One(u32),
    /// The first of these ids, so many.
    Few(&'a [u32; INLINE], usize),
    /// It has these ids.
    Many(&'a [u32]),
    /// It is not in its first pair.
    Missing,
}

impl Cache {
    /// A full cache takes less: 2 MiB of words, a quarter as much while it
    /// grows to that, and 2 MiB of ring.
    pub(crate) const MAX_BYTES: usize =
        MAX_PAIRS * size_of::<Pair>() * 5 / 4 + RING * size_of::<u32>() + (1 << 10);

    /// An empty cache; it grows to its full size with the pieces it is given.
    pub(crate) fn new() -> Cache {
        Cache {
            pairs: vec![NO_PAIR; FIRST_PAIRS],
            used: 0,
            turn: 0,
            ring: Vec::new(),
            head: 0,
        }
    }

    #[inline(always)]
    fn at(&self, hash: u64) -> usize {
        hash as usize & (self.pairs.len() - 1)
    }

    /// Asks for the memory of a key's pair before it is needed.
    #[inline(always)]
    pub(crate) fn prefetch(&self, hash: u64) {
        prefetch(&self.pairs, self.at(hash));
    }

    /// What is known of a piece; `key` is [`Key::of`] it, `hash` its hash.
    #[inline(always)]
    pub(crate) fn get_first(&self, key: Key, hash: u64, piece: &[u8]) -> Found<'_> {
        let [a, b] = self.pairs[self.at(hash)].0;
        // Without a branch on which of the two it is.
        let (is_a, is_b) = (a.is(key), b.is(key));
        let mask = u64::from(is_a).wrapping_neg();
        let word = a.1 & mask | b.1 & !mask;
        let none = u32::from(is_a | is_b).wrapping_sub(1);
        let number = (word >> NUMBER_SHIFT) as u32 & NUMBER_MASK | none;
        if number < PLACE {
            return Found::One(number);
        }
        if number == u32::MAX {
            return Found::Missing;
        }
        self.in_ring(number - PLACE, piece)
    }

    /// What is known of a piece, wherever it is; next time it is found at
    /// first sight, and another one is not.
    pub(crate) fn get(&mut self, key: Key, piece: &[u8]) -> Found<'_> {
        let home = self.at(key.hash());
        for place in 0..PLACES {
            for way in 0..2 {
                let word = self.pairs[home ^ place].0[way];
                let number = word.number_of(key);
                if number.is_some() && place > 0 {
                    self.turn = self.turn.wrapping_add(1);
                    let other = &mut self.pairs[home].0[self.turn % 2];
                    let other = std::mem::replace(other, word);
                    self.pairs[home ^ place].0[way] = other;
                }
                match number {
                    Some(id) if id < PLACE => return Found::One(id),
                    Some(number) => return self.in_ring(number - PLACE, piece),
                    None if word.is_none() => return Found::Missing,
                    None => {}
                }
            }
        }
        Found::Missing
    }

    #[inline(always)]
    fn in_ring(&self, place: u32, piece: &[u8]) -> Found<'_> {
        if self.head - place > RING as u32 {
            return Found::Missing; // overwritten
        }
        let entry = &self.ring[place as usize % RING..];
        let count = entry[0] as usize;
        if piece.len() <= KEY_BYTES && count <= INLINE {
            if let Some(ids) = entry[1..].first_chunk() {
                return Found::Few(ids, count);
            }
        }
        let (ids, rest) = entry[1..].split_at(count);
        if piece.len() > KEY_BYTES {
            let same_len = rest[0] as usize == piece.len();
            if !same_len || !words(piece).zip(&rest[1..]).all(|(a, &b)| a == b) {
                return Found::Missing;
            }
        }
        Found::Many(ids)
    }

    /// Remembers the ids of a piece of at most [`CACHED_BYTES`].
    pub(crate) fn insert(&mut self, key: Key, piece: &[u8], ids: &[u32]) {
        if self.used >= self.pairs.len() && self.pairs.len() < MAX_PAIRS {
            self.grow();
        }
        let number = match ids {
            &[id] if piece.len() <= KEY_BYTES => id,
            _ => self.write_to_ring(piece, ids) + PLACE,
        };
        self.put(Word::new(key, number));
    }

    fn put(&mut self, word: Word) {
        let home = self.at(word.key().hash());
        for place in 0..PLACES {
            for old in &mut self.pairs[home ^ place].0 {
                if old.is_none() || old.key() == word.key() {
                    self.used += usize::from(old.is_none());
                    *old = word;
                    return;
                }
            }
        }
        // Where all is full any word gives way: the oldest would be the worst
        // choice for a text that is read again and again.
        self.turn = self.turn.wrapping_add(1);
        self.pairs[home].0[self.turn % 2] = word;
    }

    fn grow(&mut self) {
        let larger = vec![NO_PAIR; self.pairs.len() * 4];
        self.used = 0;
        for pair in std::mem::replace(&mut self.pairs, larger) {
            for word in pair.0 {
                if !word.is_none() {
                    self.put(word);
                }
            }
        }
    }

    /// The place of a new entry of the ring.
    fn write_to_ring(&mut self, piece: &[u8], ids: &[u32]) -> u32 {
        if self.ring.is_empty() {
            self.ring = vec![0; RING + INLINE];
        }
        if self.head > MAX_HEAD {
            // Places would repeat, and old words point to new ids.
            self.pairs.fill(NO_PAIR);
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
        match piece {
            [a, b, b'0'] => vec![u32::from(*a) << 8 | u32::from(*b)],
            _ => piece
                .iter()
                .map(|&b| b.into())
                .chain([piece.len() as u32])
                .collect(),
        }
    }

    fn insert(cache: &mut Cache, piece: &[u8]) {
        cache.insert(Key::of(piece), piece, &ids_of(piece));
    }

    fn get(cache: &mut Cache, piece: &[u8]) -> Option<Vec<u32>> {
        let key = Key::of(piece);
        let all = |found: Found| match found {
            Found::One(id) => Some(vec![id]),
            Found::Few(ids, count) => Some(ids[..count].to_vec()),
            Found::Many(ids) => Some(ids.to_vec()),
            Found::Missing => None,
        };
        let ids = all(cache.get(key, piece));
        let first = all(cache.get_first(key, key.hash(), piece));
        assert!(first.is_none() || first == ids);
        ids
    }

    #[test]
    fn the_cache_forgets_but_never_errs_and_never_grows_further() {
        let mut cache = Cache::new();
        let mut known = 0;
        for i in 0..600_000u32 {
            let text = format!("{i:x}");
            let piece = if i % 3 == 0 { text.repeat(3) } else { text };
            insert(&mut cache, piece.as_bytes());
            assert_eq!(
                get(&mut cache, piece.as_bytes()),
                Some(ids_of(piece.as_bytes()))
            );
            let earlier = format!("{:x}", i / 2);
            if let Some(ids) = get(&mut cache, earlier.as_bytes()) {
                assert_eq!(ids, ids_of(earlier.as_bytes()));
                known += 1;
            }
        }
        assert!(known > 50_000, "{known}");
        let bytes = size_of_val(&*cache.pairs) + size_of_val(&*cache.ring);
        assert!(bytes <= Cache::MAX_BYTES);
    }

    #[test]
    fn the_cache_starts_again_before_places_repeat() {
        let mut cache = Cache::new();
        insert(&mut cache, b"old");
        cache.head = MAX_HEAD - 1;
        for piece in [&b"new"[..], b"newer", b"newest"] {
            insert(&mut cache, piece);
        }
        assert_eq!(get(&mut cache, b"old"), None);
        assert_eq!(get(&mut cache, b"newest"), Some(ids_of(b"newest")));
        assert!(cache.head < 100);
    }
}
