//! Pieces that were encoded before: the vocabulary itself, and a cache.
//!
//! [`Words`] is filled once, from the tokens that their own bytes encode to,
//! and then only read, so all threads share it. [`Cache`] holds what merging
//! gave for other pieces; a call borrows one for its time, so it is never
//! contended. Its size is fixed ([`Cache::MAX_BYTES`]): a new piece replaces an
//! old one, and hostile text can make it useless but not large.
//!
//! A piece of at most 15 bytes is a [`Key`]: its bytes in two words with the
//! length in the last byte, compared and hashed without touching memory.
//! Called by `encode` only.

use std::hash::Hasher;

use rustc_hash::{FxHashMap, FxHasher};

/// Pieces up to this many bytes fit a [`Key`].
pub(crate) const KEY_BYTES: usize = 15;
/// Pieces up to this many bytes are remembered.
pub(crate) const LONG_BYTES: usize = 128;
/// Ids that fit an entry.
const INLINE: usize = 3;

/// A short piece: its bytes, zeros, and its length in the last byte.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Key(u64, u64);

/// `MASKS[n]` keeps the first n of 16 bytes; the second word adds the length.
const MASKS: [(u64, u64); KEY_BYTES + 1] = {
    let mut masks = [(0, 0); KEY_BYTES + 1];
    let mut n = 1;
    while n <= KEY_BYTES {
        let all = u128::MAX >> (128 - 8 * n);
        masks[n] = (all as u64, (all >> 64) as u64);
        n += 1;
    }
    masks
};

impl Key {
    /// The key of a piece of at most 15 bytes.
    pub(crate) fn new(piece: &[u8]) -> Key {
        let mut bytes = [0; 16];
        bytes[..piece.len()].copy_from_slice(piece);
        bytes[KEY_BYTES] = piece.len() as u8;
        let all = u128::from_le_bytes(bytes);
        Key(all as u64, (all >> 64) as u64)
    }

    /// The key of the first `len` of `bytes`; for over 15, a key like no other.
    #[inline(always)]
    pub(crate) fn first(bytes: &[u8; 16], len: usize) -> Key {
        let all = u128::from_le_bytes(*bytes);
        let len = if len <= KEY_BYTES { len } else { 0 };
        let (low, high) = MASKS[len];
        Key(all as u64 & low, (all >> 64) as u64 & high | (len as u64) << 56)
    }

    #[inline(always)]
    fn hash(self) -> u64 {
        let a = self.0 ^ 0x9E37_79B9_7F4A_7C15;
        let b = self.1 ^ 0xD6E8_FEB8_6659_FD93;
        let product = u128::from(a) * u128::from(b);
        (product >> 64) as u64 ^ product as u64
    }
}

/// A short piece and its ids. `count` is 0 where the slot is empty; above
/// [`INLINE`], `ids[0]` says where in the ring of the cache the ids lie.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
struct Entry {
    key: Key,
    ids: [u32; INLINE],
    count: u32,
}

const EMPTY: Entry = Entry {
    key: Key(0, 0),
    ids: [0; INLINE],
    count: 0,
};

/// The tokens that their own bytes encode to, by their bytes.
pub(crate) struct Words {
    slots: Vec<Entry>, // at most half full
    long: FxHashMap<Box<[u8]>, u32>,
    longest: usize,
}

impl Words {
    /// A table with room for `tokens` tokens.
    pub(crate) fn new(tokens: usize) -> Words {
        Words {
            slots: vec![EMPTY; (tokens * 2).next_power_of_two().max(1024)],
            long: Default::default(),
            longest: 0,
        }
    }

    /// Adds a token. Frequent ones come first: they get the better slots.
    pub(crate) fn insert(&mut self, bytes: &[u8], id: u32) {
        if bytes.len() > KEY_BYTES {
            self.longest = self.longest.max(bytes.len());
            self.long.insert(bytes.into(), id);
            return;
        }
        let key = Key::new(bytes);
        let mut slot = self.slot(key);
        while self.slots[slot].count > 0 {
            if self.slots[slot].key == key {
                return; // the first of two tokens with the same bytes wins
            }
            slot = (slot + 1) & (self.slots.len() - 1);
        }
        let (ids, count) = ([id, 0, 0], 1);
        self.slots[slot] = Entry { key, ids, count };
    }

    /// Where the search for `key` begins.
    #[inline(always)]
    pub(crate) fn slot(&self, key: Key) -> usize {
        key.hash() as usize & (self.slots.len() - 1)
    }

    /// Asks for the memory of a slot before it is needed.
    #[inline(always)]
    pub(crate) fn prefetch(&self, slot: usize) {
        prefetch(&self.slots, slot);
    }

    /// The id of `key` if it is in its first slot, where nearly all are.
    #[inline(always)]
    pub(crate) fn get_first(&self, key: Key, slot: usize) -> Option<u32> {
        let entry = &self.slots[slot & (self.slots.len() - 1)];
        (entry.key == key && entry.count > 0).then_some(entry.ids[0])
    }

    /// The id of a short piece that is a token.
    #[inline]
    pub(crate) fn get(&self, key: Key) -> Option<u32> {
        let mut slot = self.slot(key);
        loop {
            let entry = &self.slots[slot];
            if entry.key == key {
                return Some(entry.ids[0]);
            }
            if entry.count == 0 {
                return None;
            }
            slot = (slot + 1) & (self.slots.len() - 1);
        }
    }

    /// The id of a long piece that is a token.
    #[inline]
    pub(crate) fn get_long(&self, piece: &[u8]) -> Option<u32> {
        if piece.len() > self.longest {
            return None;
        }
        self.long.get(piece).copied()
    }
}

/// What merging gave for pieces that are no tokens, within a fixed size.
pub(crate) struct Cache {
    slots: Vec<Entry>, // sets of four, the newest first
    used: usize,       // slots that are not empty
    ring: Vec<u32>,    // ids that do not fit an entry, overwritten in turn
    head: u32,         // how many ids were ever written to the ring
    long: Vec<Long>,   // one slot for each hash
}

#[derive(Default)]
struct Long {
    piece: Vec<u8>,
    ids: Vec<u32>,
}

const WAYS: usize = 4;
const FIRST_SLOTS: usize = 1 << 11;
const MAX_SLOTS: usize = 1 << 17;
const RING: usize = 1 << 18;
const LONG_SLOTS: usize = 1 << 12;

impl Cache {
    /// A full cache takes less: 4 MiB of short pieces (half as much again while
    /// it grows), 1 MiB of ids, and long pieces with at most an id per byte.
    pub(crate) const MAX_BYTES: usize = MAX_SLOTS * size_of::<Entry>() * 3 / 2
        + RING * size_of::<u32>()
        + LONG_SLOTS * (size_of::<Long>() + 2 * LONG_BYTES * (1 + size_of::<u32>()));

    /// An empty cache; it grows to its full size with the pieces it is given.
    pub(crate) fn new() -> Cache {
        Cache {
            slots: vec![EMPTY; FIRST_SLOTS],
            used: 0,
            ring: Vec::new(),
            head: 0,
            long: Vec::new(),
        }
    }

    #[inline(always)]
    fn set(&self, key: Key) -> usize {
        (key.hash() >> 32) as usize & (self.slots.len() - WAYS)
    }

    /// Asks for the memory of a set before it is needed, if it is.
    #[inline(always)]
    pub(crate) fn prefetch(&self, key: Key) {
        let set = self.set(key);
        prefetch(&self.slots, set);
        prefetch(&self.slots, set + 2);
    }

    /// The ids of a short piece.
    #[inline]
    pub(crate) fn get(&self, key: Key) -> Option<&[u32]> {
        let set = self.set(key);
        let entry = self.slots[set..set + WAYS].iter().find(|e| e.key == key)?;
        let count = entry.count as usize;
        if count <= INLINE {
            return Some(&entry.ids[..count]);
        }
        // Overwritten once the ring has come round.
        if self.head - entry.ids[0] > RING as u32 {
            return None;
        }
        let start = entry.ids[0] as usize % RING;
        Some(&self.ring[start..start + count])
    }

    /// Remembers the ids of a short piece.
    pub(crate) fn insert(&mut self, key: Key, ids: &[u32]) {
        if self.used * 2 > self.slots.len() && self.slots.len() < MAX_SLOTS {
            self.grow();
        }
        let (count, mut inline) = (ids.len() as u32, [0; INLINE]);
        if ids.len() <= INLINE {
            inline[..ids.len()].copy_from_slice(ids);
        } else {
            inline[0] = self.write_to_ring(ids);
        }
        let ids = inline;
        self.place(Entry { key, ids, count });
    }

    fn place(&mut self, entry: Entry) {
        let set = self.set(entry.key);
        let ways = &mut self.slots[set..set + WAYS];
        let old = ways.iter().position(|e| e.key == entry.key || e.count == 0);
        let gives_way = old.unwrap_or(WAYS - 1);
        self.used += usize::from(ways[gives_way].count == 0);
        ways.copy_within(..gives_way, 1);
        ways[0] = entry;
    }

    fn grow(&mut self) {
        let larger = vec![EMPTY; self.slots.len() * 4];
        let old = std::mem::replace(&mut self.slots, larger);
        self.used = 0;
        for entry in old.into_iter().rev().filter(|e| e.count > 0) {
            self.place(entry);
        }
    }

    /// Where in the ring the ids begin, counted from its beginning.
    fn write_to_ring(&mut self, ids: &[u32]) -> u32 {
        if self.ring.is_empty() {
            self.ring = vec![0; RING];
        }
        if self.head > u32::MAX - 2 * RING as u32 {
            // Positions would repeat, and old entries point to new ids.
            self.slots.fill(EMPTY);
            (self.used, self.head) = (0, 0);
        }
        let mut start = self.head as usize % RING;
        if start + ids.len() > RING {
            self.head += (RING - start) as u32;
            start = 0;
        }
        let position = self.head;
        self.ring[start..start + ids.len()].copy_from_slice(ids);
        self.head += ids.len() as u32;
        position
    }

    /// The ids of a piece of 16 to [`LONG_BYTES`] bytes.
    pub(crate) fn get_long(&self, piece: &[u8]) -> Option<&[u32]> {
        let entry = self.long.get(long_slot(piece))?;
        (entry.piece == piece).then_some(entry.ids.as_slice())
    }

    /// Remembers the ids of such a piece.
    pub(crate) fn insert_long(&mut self, piece: &[u8], ids: &[u32]) {
        if self.long.is_empty() {
            self.long.resize_with(LONG_SLOTS, Long::default);
        }
        let entry = &mut self.long[long_slot(piece)];
        entry.piece.clear();
        entry.piece.extend_from_slice(piece);
        entry.ids.clear();
        entry.ids.extend_from_slice(ids);
    }
}

#[inline(always)]
fn prefetch(slots: &[Entry], slot: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
        let entry = slots.as_ptr().wrapping_add(slot);
        // SAFETY: SSE is part of x86-64, and a prefetch reads nothing as far as
        // the program can tell, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(entry.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (slots, slot);
}

fn long_slot(piece: &[u8]) -> usize {
    let mut hasher = FxHasher::default();
    hasher.write(piece);
    (hasher.finish() >> 20) as usize % LONG_SLOTS
}
