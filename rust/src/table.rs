//! A hash table from short byte strings to u64 counts, and the pieces that come out of it.
//!
//! Nine tenths of the time of a general map would go into comparing and allocating keys: here a
//! piece of up to 15 bytes is two u64 words with its length in the last byte, and longer ones (few
//! in any text) lie in one arena. `count` fills one table a thread.

use crate::count_file::Entry;

/// Counted pieces: distinct byte strings, each with how often it occurs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PieceCounts {
    bytes: Vec<u8>, // all pieces one after the other
    ends: Vec<usize>,
    counts: Vec<u64>,
}

impl PieceCounts {
    /// Adds a piece; it must not be there yet.
    pub fn push(&mut self, piece: &[u8], count: u64) {
        self.bytes.extend_from_slice(piece);
        self.ends.push(self.bytes.len());
        self.counts.push(count);
    }

    /// Every piece with its count.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], u64)> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        let ranges = starts.zip(&self.ends);
        ranges
            .zip(&self.counts)
            .map(|((start, &end), &count)| (&self.bytes[start..end], count))
    }

    /// How many distinct pieces there are.
    pub fn len(&self) -> usize {
        self.counts.len()
    }

    /// Whether there is no piece.
    pub fn is_empty(&self) -> bool {
        self.counts.is_empty()
    }

    /// The length of all distinct pieces together.
    pub fn num_bytes(&self) -> usize {
        self.bytes.len()
    }
}

const INLINE: usize = 15;
/// In the last byte of a key instead of a length: the rest is the hash, `low` the arena offset.
const LONG: u64 = 0xFF;
const FIRST_SLOTS: usize = 1 << 10;

/// One place of the table; empty if `high` is 0.
#[derive(Clone, Copy, Default)]
struct Slot {
    low: u64,
    high: u64,
    count: u64,
}

/// Byte strings with counts; open addressing, at most half full.
pub(crate) struct PieceTable {
    slots: Vec<Slot>,
    shift: u32, // hash >> shift is the home slot
    len: usize,
    arena: Vec<u8>, // long pieces, each after its length in eight bytes
}

impl Default for PieceTable {
    fn default() -> Self {
        PieceTable::for_pieces(FIRST_SLOTS / 2 - 1)
    }
}

impl PieceTable {
    /// An empty table that does not grow before it has more than `len` pieces.
    ///
    /// Whoever fills a table from another one must say how many come: they come in the order of
    /// their hash values, and in a table that is too small for them they would pile up.
    pub(crate) fn for_pieces(len: usize) -> PieceTable {
        let num_slots = (2 * len + 2).next_power_of_two().max(FIRST_SLOTS);
        PieceTable {
            slots: vec![Slot::default(); num_slots],
            shift: 64 - num_slots.ilog2(),
            len: 0,
            arena: Vec::new(),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The memory it would take with its next piece, in bytes: growing doubles the slots while the
    /// old ones are still there.
    pub(crate) fn memory(&self) -> usize {
        let factor = if self.is_full() { 3 } else { 1 };
        self.slots.len() * size_of::<Slot>() * factor + self.arena.capacity()
    }

    fn is_full(&self) -> bool {
        self.len * 2 >= self.slots.len()
    }

    /// Counts the piece `text[start..end]` (not empty) once.
    #[inline(always)]
    pub(crate) fn count(&mut self, text: &[u8], start: usize, end: usize) {
        let len = end - start;
        if len > INLINE {
            return self.add_long(&text[start..end], 1);
        }
        let (low, high) = match text[start..].first_chunk::<16>() {
            Some(chunk) => {
                let all = u128::from_le_bytes(*chunk) & (u128::MAX >> (128 - 8 * len));
                (all as u64, (all >> 64) as u64)
            }
            None => words(&text[start..end]),
        };
        self.add_key(low, high | (len as u64) << 56, 1);
    }

    /// Counts `piece` (not empty) `count` times.
    pub(crate) fn add(&mut self, piece: &[u8], count: u64) {
        if piece.len() > INLINE {
            return self.add_long(piece, count);
        }
        let (low, high) = words(piece);
        self.add_key(low, high | (piece.len() as u64) << 56, count);
    }

    #[inline(always)]
    fn add_key(&mut self, low: u64, high: u64, count: u64) {
        let mut at = (hash(low, high) >> self.shift) as usize;
        loop {
            let slot = &mut self.slots[at];
            if slot.low == low && slot.high == high {
                slot.count += count;
                return;
            }
            if slot.high == 0 {
                *slot = Slot { low, high, count };
                return self.one_more();
            }
            at = (at + 1) & (self.slots.len() - 1);
        }
    }

    #[cold]
    fn add_long(&mut self, piece: &[u8], count: u64) {
        let hash = hash_long(piece);
        let high = LONG << 56 | hash >> 8;
        let mut at = (hash >> self.shift) as usize;
        loop {
            let slot = self.slots[at];
            if slot.high == high && self.long(slot.low) == piece {
                self.slots[at].count += count;
                return;
            }
            if slot.high == 0 {
                let low = self.arena.len() as u64;
                self.arena
                    .extend_from_slice(&(piece.len() as u64).to_le_bytes());
                self.arena.extend_from_slice(piece);
                self.slots[at] = Slot { low, high, count };
                return self.one_more();
            }
            at = (at + 1) & (self.slots.len() - 1);
        }
    }

    fn long(&self, offset: u64) -> &[u8] {
        let rest = &self.arena[offset as usize..];
        let (len, rest) = rest.split_first_chunk().expect("written by add_long");
        &rest[..u64::from_le_bytes(*len) as usize]
    }

    #[inline]
    fn one_more(&mut self) {
        self.len += 1;
        if self.is_full() {
            self.grow();
        }
    }

    #[cold]
    fn grow(&mut self) {
        let slots = vec![Slot::default(); self.slots.len() * 2];
        let old = std::mem::replace(&mut self.slots, slots);
        self.shift -= 1;
        for slot in old.into_iter().filter(|slot| slot.high != 0) {
            let mut at = (self.hash_of(&slot) >> self.shift) as usize;
            while self.slots[at].high != 0 {
                at = (at + 1) & (self.slots.len() - 1);
            }
            self.slots[at] = slot;
        }
    }

    /// The hash by which a slot was placed; a long piece keeps 56 bits of it.
    fn hash_of(&self, slot: &Slot) -> u64 {
        if slot.high >> 56 == LONG {
            slot.high << 8
        } else {
            hash(slot.low, slot.high)
        }
    }

    /// Every piece with its count, in an order that means nothing; those alone whose hash modulo
    /// `shards` is `shard`.
    pub(crate) fn for_each(&self, shard: u64, shards: u64, mut f: impl FnMut(&[u8], u64)) {
        for slot in self.slots.iter().filter(|slot| slot.high != 0) {
            if shards > 1 && (self.hash_of(slot) >> 8) % shards != shard {
                continue;
            }
            let mut buffer = [0; 16];
            f(self.piece(slot, &mut buffer), slot.count);
        }
    }

    fn piece<'a>(&'a self, slot: &Slot, buffer: &'a mut [u8; 16]) -> &'a [u8] {
        if slot.high >> 56 == LONG {
            return self.long(slot.low);
        }
        *buffer = (u128::from(slot.high) << 64 | u128::from(slot.low)).to_le_bytes();
        &buffer[..(slot.high >> 56) as usize]
    }

    /// Every piece with its count, in the order of the bytes.
    pub(crate) fn sorted(&self) -> impl Iterator<Item = Entry> + '_ {
        // Fifteen bytes from the first on, then the length: the order of short pieces; what long
        // ones have in common with others is settled by comparing them whole.
        let key = |slot: &Slot| {
            let mut buffer = [0; 16];
            let piece = self.piece(slot, &mut buffer);
            let (low, high) = words(&piece[..piece.len().min(INLINE)]);
            let len = piece.len().min(INLINE + 1) as u128;
            (u128::from(high) << 64 | u128::from(low)).swap_bytes() | len
        };
        let full = self.slots.iter().filter(|slot| slot.high != 0);
        let mut order: Vec<(u128, Slot)> = full.map(|slot| (key(slot), *slot)).collect();
        order.sort_unstable_by(|a, b| {
            a.0.cmp(&b.0).then_with(|| {
                if a.0 & 0xFF > INLINE as u128 {
                    self.long(a.1.low).cmp(self.long(b.1.low))
                } else {
                    std::cmp::Ordering::Equal
                }
            })
        });
        order.into_iter().map(|(_, slot)| {
            let mut buffer = [0; 16];
            (self.piece(&slot, &mut buffer).into(), slot.count)
        })
    }
}

/// Up to fifteen bytes as two little-endian words.
fn words(piece: &[u8]) -> (u64, u64) {
    let mut buffer = [0; 16];
    buffer[..piece.len()].copy_from_slice(piece);
    let all = u128::from_le_bytes(buffer);
    (all as u64, (all >> 64) as u64)
}

/// Both halves of a 128-bit product: every bit of the key reaches the high bits.
#[inline(always)]
fn hash(low: u64, high: u64) -> u64 {
    let product =
        u128::from(low ^ 0x9E37_79B9_7F4A_7C15) * u128::from(high ^ 0xD1B5_4A32_D192_ED03);
    (product as u64 ^ (product >> 64) as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

fn hash_long(piece: &[u8]) -> u64 {
    let mut state = piece.len() as u64;
    for chunk in piece.chunks(INLINE) {
        let (low, high) = words(chunk);
        state = hash(low ^ state, high).rotate_left(23);
    }
    hash(state, 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn counts_like_a_map_and_sorts_like_one() {
        let mut table = PieceTable::default();
        let mut map: BTreeMap<Vec<u8>, u64> = BTreeMap::new();
        let text: Vec<u8> = (0..40_000u32)
            .map(|i| (i.wrapping_mul(i) >> 7) as u8 % 3)
            .collect();
        for start in 0..text.len() - 40 {
            let end = start + 1 + start * 7 % 40;
            table.count(&text, start, end);
            table.add(&text[start..end], 2);
            *map.entry(text[start..end].to_vec()).or_default() += 3;
        }
        assert_eq!(table.len, map.len());
        let sorted: Vec<(Vec<u8>, u64)> = table.sorted().map(|(p, n)| (p.into(), n)).collect();
        assert!(sorted.iter().map(|(p, n)| (p, n)).eq(&map));
        let mut shards = BTreeMap::new();
        for shard in 0..3 {
            table.for_each(shard, 3, |piece, n| {
                assert!(shards.insert(piece.to_vec(), n).is_none());
            });
        }
        assert_eq!(shards, map);
    }
}
