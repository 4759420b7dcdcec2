//! Pieces that were encoded before: the vocabulary itself, and a cache.
//!
//! [`Words`] is filled once, from the tokens that their own bytes encode to,
//! and then only read, so all threads share it. [`Cache`] holds what merging
//! gave for other pieces; a call borrows one for its time, so it is never
//! contended. Its size is fixed ([`Cache::MAX_BYTES`]): a new piece replaces an
//! old one, and hostile text can make it useless but not large.
//!
//! A piece of at most 15 bytes is a [`Key`]: its bytes in two words with the
//! length in the last four bits, compared and hashed without touching memory.
//! The cache holds a key and up to four ids in half a cache line, so that
//! nearly every piece is found by one look at one line, and its ids are copied
//! without a branch on how many they are. Called by `encode` only.

use std::hash::Hasher;

use rustc_hash::FxHasher;

use crate::decode::Tokens;
use crate::pages::ask_for_large_pages;

/// Pieces up to this many bytes fit a [`Key`].
pub(crate) const KEY_BYTES: usize = 15;
/// A key is made from this many bytes of the text.
pub(crate) const WIDE: usize = 16;
/// Pieces up to this many bytes are remembered.
pub(crate) const CACHED_BYTES: usize = 128;

/// A short piece: its bytes, zeros, and its length in the last four bits. Of a
/// longer piece a hash instead, so that the bytes must be compared as well.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Key(u64, u64);

/// `MASKS[n]` keeps the first n of 16 bytes.
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
/// Above the bytes, below the length: bits that are 0 in every key. A slot of
/// the cache has its number of ids there.
const COUNT_SHIFT: u32 = 56;
const COUNT_BITS: u64 = 0xF << COUNT_SHIFT;

impl Key {
    /// The key of a piece of at most 15 bytes.
    pub(crate) fn new(piece: &[u8]) -> Key {
        let mut bytes = [0; WIDE];
        bytes[..piece.len()].copy_from_slice(piece);
        let all = u128::from_le_bytes(bytes);
        Key(all as u64, (all >> 64) as u64 | (piece.len() as u64) << 60)
    }

    /// [`Key::new`] of `text[start..start + len]`, by wide loads.
    ///
    /// # Safety
    ///
    /// `text` goes on for [`WIDE`] bytes from `start`.
    #[inline(always)]
    pub(crate) unsafe fn at(text: &[u8], start: usize, len: usize) -> Key {
        debug_assert!(start + WIDE <= text.len() && len <= KEY_BYTES);
        // SAFETY: these are the bytes that the caller vouches for, and the
        // read asks for no alignment.
        let all = unsafe { text.as_ptr().add(start).cast::<[u8; WIDE]>().read() };
        let all = u128::from_le_bytes(all);
        let (low_mask, high_mask) = MASKS[len % 16];
        let (low, high) = (all as u64 & low_mask, (all >> 64) as u64 & high_mask);
        Key(low, high | (len as u64) << 60)
    }

    /// The key of a piece of more than 15 bytes: no length, and never 0.
    #[inline(never)]
    fn long(piece: &[u8]) -> Key {
        let mut hasher = FxHasher::default();
        hasher.write(piece);
        let hash = hasher.finish();
        Key(hash, hash >> 8 | 1)
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

/// The tokens that their own bytes encode to, by their bytes.
pub(crate) struct Words {
    /// At most half full, a power of two: an id and eleven bits of a hash.
    slots: Vec<u32>,
    longest: usize,
}

const NO_WORD: u32 = u32::MAX;
const WORD_BITS: u32 = 21;

impl Words {
    /// A table with room for `tokens` tokens.
    pub(crate) fn new(tokens: usize) -> Words {
        Words {
            slots: vec![NO_WORD; (tokens * 2).next_power_of_two()],
            longest: 0,
        }
    }

    /// Adds the token `id` of `tokens`. Of two with the same bytes the first is
    /// found.
    pub(crate) fn insert(&mut self, id: u32, tokens: &Tokens) {
        let bytes = tokens.get(id);
        self.longest = self.longest.max(bytes.len());
        let hash = Key::of(bytes).hash();
        let mut slot = hash as usize & (self.slots.len() - 1);
        while self.slots[slot] != NO_WORD {
            slot = (slot + 1) & (self.slots.len() - 1);
        }
        self.slots[slot] = tag(hash) | id;
    }

    /// The id of a piece that is a token; `hash` is that of its key.
    pub(crate) fn get(&self, hash: u64, piece: &[u8], tokens: &Tokens) -> Option<u32> {
        if piece.len() > self.longest {
            return None;
        }
        let mut slot = hash as usize & (self.slots.len() - 1);
        loop {
            let word = self.slots[slot];
            if word == NO_WORD {
                return None;
            }
            if (word ^ tag(hash)) >> WORD_BITS == 0 {
                let id = word & ((1 << WORD_BITS) - 1);
                if tokens.get(id) == piece {
                    return Some(id);
                }
            }
            slot = (slot + 1) & (self.slots.len() - 1);
        }
    }
}

/// Bits of a hash that no slot is chosen by, where a word has them.
fn tag(hash: u64) -> u32 {
    ((hash >> (64 - 11)) as u32) << WORD_BITS
}

/// The ids of pieces met before, within a fixed size.
///
/// A short piece of at most four ids has them in its slot. Any other piece has
/// a place in the ring there, where there is the number of ids, the ids and,
/// for a long piece, its length and bytes; what is new overwrites what is
/// oldest.
pub(crate) struct Cache {
    pairs: Vec<Pair>,
    used: usize, // slots that are not empty
    turn: usize, // which slot gives way next
    ring: Vec<u32>,
    head: u32, // numbers ever written to the ring; places count like this too
}

/// A piece, the number of its ids (0 if they are in the ring) and the ids.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
struct Slot {
    key: Key, // with the number in COUNT_BITS
    ids: [u32; INLINE],
}

const EMPTY: Slot = Slot {
    key: Key(0, 0),
    ids: [0; INLINE],
};

impl Slot {
    fn new(key: Key, count: usize, ids: [u32; INLINE]) -> Slot {
        let key = Key(key.0, key.1 | (count as u64) << COUNT_SHIFT);
        Slot { key, ids }
    }

    fn is_empty(&self) -> bool {
        self.key.1 == 0
    }

    #[inline(always)]
    fn is(&self, key: Key) -> bool {
        (self.key.0 ^ key.0) | (self.key.1 ^ key.1) & !COUNT_BITS == 0
    }

    fn key(&self) -> Key {
        Key(self.key.0, self.key.1 & !COUNT_BITS)
    }

    #[inline(always)]
    fn count(&self) -> usize {
        (self.key.1 >> COUNT_SHIFT) as usize & 0xF
    }
}

/// Two slots that are looked at together: a cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Pair([Slot; 2]);

const NO_PAIR: Pair = Pair([EMPTY; 2]);
const FIRST_PAIRS: usize = 1 << 9;
const MAX_PAIRS: usize = 1 << 17;
const RING: usize = 1 << 19;
/// Places start again before they would repeat.
const MAX_HEAD: u32 = u32::MAX - 2 * RING as u32;
/// A piece that found its pair full is in one of those around it.
const PLACES: usize = 4;
/// Two of so many pieces that are found elsewhere move to their pair: frequent
/// ones get there soon, and rare ones drive few frequent ones away.
const MOVES: usize = 8;
/// A slot has room for so many ids.
pub(crate) const INLINE: usize = 4;

impl Cache {
    /// A full cache takes less: 8 MiB of slots, a quarter as much while it
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

    /// Four ids of which the first so many are those of a piece; none of them
    /// where it is not in its slot at first sight. `hash` is that of the key.
    #[inline(always)]
    pub(crate) fn get_first(&self, key: Key, hash: u64) -> (&[u32; INLINE], usize) {
        let [a, b] = &self.pairs[self.at(hash)].0;
        // Without a branch on which of the two it is.
        let slot = if a.is(key) { a } else { b };
        let count = if slot.is(key) { slot.count() } else { 0 };
        (&slot.ids, count)
    }

    /// The ids of a piece, wherever they are; now and then it is found at first
    /// sight from then on. `key` is [`Key::of`] the piece.
    pub(crate) fn get(&mut self, key: Key, piece: &[u8]) -> Option<&[u32]> {
        let home = self.at(key.hash());
        for place in 0..PLACES {
            for way in 0..2 {
                let slot = self.pairs[home ^ place].0[way];
                if slot.is_empty() {
                    return None;
                }
                if !slot.is(key) {
                    continue;
                }
                let mut at = (home ^ place, way);
                if place > 0 {
                    self.turn = self.turn.wrapping_add(1);
                    if self.turn % MOVES < 2 {
                        let first = (home, self.turn % 2);
                        self.pairs[at.0].0[at.1] = self.pairs[first.0].0[first.1];
                        self.pairs[first.0].0[first.1] = slot;
                        at = first;
                    }
                }
                return match slot.count() {
                    0 => self.in_ring(slot.ids[0], piece),
                    count => Some(&self.pairs[at.0].0[at.1].ids[..count]),
                };
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
    pub(crate) fn insert(&mut self, key: Key, piece: &[u8], ids: &[u32]) {
        if self.used >= self.pairs.len() && self.pairs.len() < MAX_PAIRS {
            self.grow();
        }
        let mut few = [0; INLINE];
        let mut count = 0;
        if ids.len() <= INLINE && piece.len() <= KEY_BYTES {
            count = ids.len();
            few[..count].copy_from_slice(ids);
        } else {
            few[0] = self.write_to_ring(piece, ids);
        }
        self.put(Slot::new(key, count, few));
    }

    fn put(&mut self, slot: Slot) {
        let home = self.at(slot.key().hash());
        for place in 0..PLACES {
            for old in &mut self.pairs[home ^ place].0 {
                if old.is_empty() || old.key() == slot.key() {
                    self.used += usize::from(old.is_empty());
                    *old = slot;
                    return;
                }
            }
        }
        // Where all is full any slot gives way but those at home, which are
        // likely the most frequent: the oldest would be the worst choice for a
        // text that is read again and again.
        self.turn = self.turn.wrapping_add(1);
        let (place, way) = (1 + self.turn / 2 % (PLACES - 1), self.turn % 2);
        self.pairs[home ^ place].0[way] = slot;
    }

    fn grow(&mut self) {
        let mut larger = Vec::with_capacity(self.pairs.len() * 4);
        ask_for_large_pages(&mut larger);
        larger.resize(self.pairs.len() * 4, NO_PAIR);
        self.used = 0;
        for pair in std::mem::replace(&mut self.pairs, larger) {
            for slot in pair.0 {
                if !slot.is_empty() {
                    self.put(slot);
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
            // Places would repeat, and old slots point to new ids.
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
            text in prop::collection::vec(any::<u8>(), WIDE..50),
            start in 0usize..34,
            len in 1usize..=KEY_BYTES,
        ) {
            let start = start.min(text.len() - WIDE);
            // SAFETY: `start` is at least 16 bytes before the end.
            let key = unsafe { Key::at(&text, start, len) };
            prop_assert_eq!(key, Key::new(&text[start..start + len]));
        }

        #[test]
        fn keys_are_as_different_as_pieces(
            a in prop::collection::vec(0u8..3, 1..=KEY_BYTES),
            b in prop::collection::vec(0u8..3, 1..=KEY_BYTES),
        ) {
            prop_assert_eq!(Key::new(&a) == Key::new(&b), a == b);
            let slot = Slot::new(Key::new(&a), 4, [7; INLINE]);
            prop_assert_eq!(slot.is(Key::new(&b)), a == b);
            prop_assert_eq!((slot.key(), slot.count()), (Key::new(&a), 4));
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
        let ids = cache.get(key, piece).map(<[u32]>::to_vec);
        let (few, count) = cache.get_first(key, key.hash());
        let first = (count > 0).then(|| few[..count].to_vec());
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
