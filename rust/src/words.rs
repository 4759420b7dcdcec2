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

use rustc_hash::{FxHashMap, FxHasher};

/// Pieces up to this many bytes fit a [`Key`].
pub(crate) const KEY_BYTES: usize = 12;
/// Pieces up to this many bytes are remembered.
pub(crate) const LONG_BYTES: usize = 128;
/// Ids that fit an entry.
const INLINE: usize = 3;

/// A short piece: its bytes, zeros, and its length in the last four bits.
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
const ID_SHIFT: u32 = 32;
const ID_BITS: u64 = 0xFFF_FFFF << ID_SHIFT;

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

    #[inline(always)]
    pub(crate) fn hash(self) -> u64 {
        let product = u128::from(self.0) * u128::from(self.1 ^ 0x9E37_79B9_7F4A_7C15);
        (product >> 64) as u64 ^ product as u64
    }
}

/// A short token: its key with its id in the bits that are free.
#[derive(Clone, Copy)]
#[repr(C, align(16))]
struct Word(u64, u64);

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
    slots: Vec<Word>, // at most half full; a power of two
    long: FxHashMap<Box<[u8]>, u32>,
    longest: usize,
}

impl Words {
    /// A table with room for `tokens` tokens.
    pub(crate) fn new(tokens: usize) -> Words {
        Words {
            slots: vec![Word(0, 0); (tokens * 2).next_power_of_two().max(1024)],
            long: FxHashMap::default(),
            longest: 0,
        }
    }

    /// Adds a token. Frequent ones come first: they get the better slots.
    pub(crate) fn insert(&mut self, bytes: &[u8], id: u32) {
        if bytes.len() > KEY_BYTES {
            self.longest = self.longest.max(bytes.len());
            self.long.entry(bytes.into()).or_insert(id);
            return;
        }
        let key = Key::new(bytes);
        let mut slot = key.hash() as usize & (self.slots.len() - 1);
        while self.slots[slot].1 != 0 {
            if self.slots[slot].id(key).is_some() {
                return; // the first of two tokens with the same bytes wins
            }
            slot = (slot + 1) & (self.slots.len() - 1);
        }
        self.slots[slot] = Word(key.0, key.1 | u64::from(id) << ID_SHIFT);
    }

    /// Asks for the memory of a key's first slot before it is needed.
    #[inline(always)]
    pub(crate) fn prefetch(&self, hash: u64) {
        prefetch(&self.slots, hash as usize & (self.slots.len() - 1));
    }

    /// The id of a key if it is in its first slot, where nearly all are.
    #[inline(always)]
    pub(crate) fn get_first(&self, key: Key, hash: u64) -> Option<u32> {
        self.slots[hash as usize & (self.slots.len() - 1)].id(key)
    }

    /// The id of a short piece that is a token.
    #[inline]
    pub(crate) fn get(&self, key: Key) -> Option<u32> {
        let mut slot = key.hash() as usize & (self.slots.len() - 1);
        while self.slots[slot].1 != 0 {
            if let Some(id) = self.slots[slot].id(key) {
                return Some(id);
            }
            slot = (slot + 1) & (self.slots.len() - 1);
        }
        None
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

impl Word {
    #[inline(always)]
    fn id(self, key: Key) -> Option<u32> {
        let difference = (self.0 ^ key.0) | (self.1 ^ key.1) & !ID_BITS;
        (difference == 0).then_some(((self.1 & ID_BITS) >> ID_SHIFT) as u32)
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
const LONG_SLOTS: usize = 1 << 13;

impl Cache {
    /// A full cache takes less: 4 MiB of short pieces (half as much again while
    /// it grows), 1 MiB of ids, and long pieces with at most an id per byte.
    pub(crate) const MAX_BYTES: usize = MAX_SLOTS * size_of::<Entry>() * 3 / 2
        + RING * size_of::<u32>()
        + LONG_SLOTS * (size_of::<Long>() + LONG_BYTES * (1 + size_of::<u32>()));

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
    fn set(&self, hash: u64) -> usize {
        (hash >> 32) as usize & (self.slots.len() - WAYS)
    }

    /// Asks for the memory of a set before it is needed.
    #[inline(always)]
    pub(crate) fn prefetch(&self, hash: u64) {
        let set = self.set(hash);
        prefetch(&self.slots, set);
        prefetch(&self.slots, set + 2);
    }

    /// The ids of a short piece.
    #[inline]
    pub(crate) fn get(&self, key: Key) -> Option<&[u32]> {
        let set = self.set(key.hash());
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
        let set = self.set(entry.key.hash());
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

    /// The ids of a piece of 13 to [`LONG_BYTES`] bytes.
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
        entry.piece.reserve_exact(piece.len());
        entry.piece.extend_from_slice(piece);
        entry.ids.clear();
        entry.ids.reserve_exact(ids.len());
        entry.ids.extend_from_slice(ids);
    }
}

#[inline(always)]
fn prefetch<T>(slots: &[T], slot: usize) {
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
