//! Encoding: from text to ids by way of pieces.
//!
//! A piece becomes its bytes, then the pair of lowest rank is joined, leftmost
//! first, until no pair has a rank. Nearly every piece of ordinary text is
//! itself a token, so the loop in [`Bpe::encode`] is one look into the table of
//! tokens (`words`); what is not there may be in the cache, and what is not in
//! the cache is merged (`merge`) and put there.
//!
//! The loop takes pieces in batches: first it cuts all pieces of a batch,
//! hashes them and asks for the cache lines they need, then it looks them up
//! (`batch`).
//!
//! Who calls it: the Python module, and Rust programs. It never looks for
//! special tokens.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use crate::batch::{Batch, BlockEnds, Ends, BATCH, FULL_BATCH};
use crate::blocks::Blocks;
use crate::decode::Tokens;
use crate::error::{Error, ErrorKind};
#[cfg(target_arch = "x86_64")]
use crate::masks::{has_avx2, Avx2};
use crate::masks::{Level, Plain};
use crate::merge::{Merges, MAX_TOKENS};
use crate::merge_short::SHORT;
use crate::pages::ask_for_large_pages;
use crate::split::{split, Pattern};
use crate::unicode::Table;
use crate::words::{Cache, Key, Words, CACHED_BYTES, INLINE};
use crate::FIRST_MERGE_ID;

/// Windows of long pieces are remembered up to this many bytes: where they have to be long, as in
/// a run of one character of which there are long tokens, they are likely all the same.
const MAX_CACHED_PART: usize = 1024;
/// Caches kept between calls; more calls than this at once make their own.
const MAX_CACHES: usize = 32;
/// A batch of texts is shared out in portions of about this many bytes.
const PORTION_BYTES: usize = 1 << 16;

/// A trained byte-level BPE: split pattern and merges.
///
/// All methods take `&self` and may be called from many threads at once. Each
/// call at a time borrows a cache of at most [`Bpe::MAX_CACHE_BYTES`].
pub struct Bpe {
    pattern: Pattern,
    merges: Vec<(u32, u32)>,
    tokens: Tokens,
    table: Merges,
    words: Words,
    caches: Mutex<Vec<State>>, // borrowed by one call at a time, so never contended
}

/// What one call needs for itself.
struct State {
    cache: Cache,
    batches: Box<[Batch; 2]>,
    ids: Vec<u32>, // of the piece at hand
}

impl State {
    fn new() -> State {
        State {
            cache: Cache::new(),
            batches: Box::new([Batch::new(), Batch::new()]),
            ids: Vec::new(),
        }
    }
}

/// Where ids go: a list of them, or a mere count.
trait Output {
    fn many(&mut self, ids: &[u32]);
}

impl Output for Vec<u32> {
    #[inline(always)]
    fn many(&mut self, ids: &[u32]) {
        self.extend_from_slice(ids);
    }
}

impl Output for Vec<u16> {
    #[inline(always)]
    fn many(&mut self, ids: &[u32]) {
        self.extend(ids.iter().map(|&id| id as u16));
    }
}

impl Output for usize {
    #[inline(always)]
    fn many(&mut self, ids: &[u32]) {
        *self += ids.len();
    }
}

impl Bpe {
    /// More memory than one call's cache ever takes.
    pub const MAX_CACHE_BYTES: usize = Cache::MAX_BYTES;

    /// A BPE from merges in the order in which they were learnt.
    ///
    /// Fails if a merge names an id that does not exist yet or a pair twice,
    /// or if there are more than 2^21 tokens or 256 MiB in them.
    pub fn new(merges: Vec<(u32, u32)>, pattern: Pattern) -> Result<Bpe, Error> {
        check_size(merges.len() + FIRST_MERGE_ID as usize)?;
        let mut tokens = Tokens::new();
        for byte in 0..=255 {
            tokens.push(&[byte])?;
        }
        let mut pairs = Vec::with_capacity(merges.len());
        for (i, &pair) in merges.iter().enumerate() {
            let id = FIRST_MERGE_ID + i as u32;
            if pair.0 >= id || pair.1 >= id {
                let message = format!("merge {i} {pair:?} uses an id above {}", id - 1);
                return Err(Error::new(ErrorKind::InvalidMerges, message));
            }
            tokens.push_pair(pair.0, pair.1)?;
            pairs.push((pair.0, pair.1, id));
        }
        let byte_ids = std::array::from_fn(|byte| byte as u32);
        let table = Merges::new(byte_ids, &pairs, &tokens, true)?;
        // Training makes only tokens that their own bytes encode to; a list
        // of merges from elsewhere may hold others.
        let mut words = Words::new(tokens.len());
        let mut ids = Vec::new();
        for id in 0..tokens.len() as u32 {
            ids.clear();
            table.piece(tokens.get(id), &mut ids);
            if ids == [id] {
                words.insert(id, &tokens);
            }
        }
        Ok(Bpe::from_parts(pattern, merges, tokens, table, words))
    }

    pub(crate) fn from_parts(
        pattern: Pattern,
        merges: Vec<(u32, u32)>,
        tokens: Tokens,
        table: Merges,
        words: Words,
    ) -> Bpe {
        if pattern.rule().is_some() {
            Table::get(); // now, and not in the first call of encode
        }
        let caches = Mutex::new(Vec::new());
        Bpe {
            pattern,
            merges,
            tokens,
            table,
            words,
            caches,
        }
    }

    /// The split pattern.
    pub fn pattern(&self) -> Pattern {
        self.pattern
    }

    /// The merges, in the order in which they were learnt.
    ///
    /// Empty where the BPE was made from ranks.
    pub fn merges(&self) -> &[(u32, u32)] {
        &self.merges
    }

    /// Bytes plus merges.
    pub fn num_tokens(&self) -> usize {
        self.tokens.len()
    }

    /// The bytes of one token.
    pub fn token(&self, id: u32) -> Result<&[u8], Error> {
        if id as usize >= self.num_tokens() {
            return Err(self.tokens.unknown(id));
        }
        Ok(self.tokens.get(id))
    }

    /// The ids of `text`.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 4 + BATCH);
        ask_for_large_pages(&mut ids);
        self.with_state(|state| self.encode_into(text, state, &mut ids));
        ids
    }

    /// The ids of `text` in half the memory, for at most 65,536 tokens.
    ///
    /// # Panics
    ///
    /// Where there are more tokens.
    pub fn encode_u16(&self, text: &str) -> Vec<u16> {
        assert!(self.num_tokens() <= 1 << 16, "ids do not fit 16 bits");
        let mut ids = Vec::with_capacity(text.len() / 4 + BATCH);
        ask_for_large_pages(&mut ids);
        self.with_state(|state| self.encode_into(text, state, &mut ids));
        ids
    }

    /// How many ids `text` has.
    pub fn count(&self, text: &str) -> usize {
        let mut count = 0;
        self.with_state(|state| self.encode_into(text, state, &mut count));
        count
    }

    /// The ids of each of `texts`, computed on `threads` threads.
    pub fn encode_batch<S: AsRef<str> + Sync>(&self, texts: &[S], threads: usize) -> Vec<Vec<u32>> {
        let (ids, offsets) = self.encode_flat(texts, threads);
        let of_one = |range: &[usize]| ids[range[0]..range[1]].to_vec();
        offsets.windows(2).map(of_one).collect()
    }

    /// The ids of all `texts` one after the other, and where those of each
    /// begin and end: text `i` has `ids[offsets[i]..offsets[i + 1]]`.
    pub fn encode_flat<S: AsRef<str> + Sync>(
        &self,
        texts: &[S],
        threads: usize,
    ) -> (Vec<u32>, Vec<usize>) {
        self.flat(texts, threads)
    }

    /// [`Bpe::encode_flat`] in half the memory, for at most 65,536 tokens.
    ///
    /// # Panics
    ///
    /// Where there are more tokens.
    pub fn encode_flat_u16<S: AsRef<str> + Sync>(
        &self,
        texts: &[S],
        threads: usize,
    ) -> (Vec<u16>, Vec<usize>) {
        assert!(self.num_tokens() <= 1 << 16, "ids do not fit 16 bits");
        self.flat(texts, threads)
    }

    /// The bytes that `ids` stand for; they may end inside a character.
    pub fn decode(&self, ids: &[u32]) -> Result<Vec<u8>, Error> {
        self.tokens.decode(ids)
    }

    fn flat<S: AsRef<str> + Sync, I: Copy + Send + Sync>(
        &self,
        texts: &[S],
        threads: usize,
    ) -> (Vec<I>, Vec<usize>)
    where
        Vec<I>: Output,
    {
        let encode_all = |texts: &[S]| -> (Vec<I>, Vec<usize>) {
            let bytes: usize = texts.iter().map(|text| text.as_ref().len()).sum();
            let mut ids = Vec::with_capacity(bytes / 4 + BATCH);
            ask_for_large_pages(&mut ids);
            let mut offsets = Vec::with_capacity(texts.len() + 1);
            offsets.push(0);
            self.with_state(|state| {
                for text in texts {
                    self.encode_into(text.as_ref(), state, &mut ids);
                    offsets.push(ids.len());
                }
            });
            (ids, offsets)
        };
        let portions = if threads <= 1 {
            Vec::new()
        } else {
            portions(texts)
        };
        let threads = threads.min(portions.len());
        if threads <= 1 {
            return encode_all(texts);
        }
        // Each thread takes the next portion as long as there is one.
        let next = AtomicUsize::new(0);
        let work = || {
            let mut done = Vec::new();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(portion) = portions.get(index) else {
                    return done;
                };
                done.push((index, encode_all(portion)));
            }
        };
        let mut done = thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            let mut done = work();
            for other in others {
                done.extend(other.join().expect("encoding panicked"));
            }
            done
        });
        done.sort_unstable_by_key(|&(index, _)| index);
        let total = done.iter().map(|(_, (ids, _))| ids.len()).sum();
        let (mut ids, mut offsets) = (Vec::with_capacity(total), vec![0]);
        ask_for_large_pages(&mut ids);
        for (_, (portion, ends)) in done {
            let before = ids.len();
            ids.extend_from_slice(&portion);
            offsets.extend(ends[1..].iter().map(|end| before + end));
        }
        (ids, offsets)
    }

    fn with_state<T>(&self, run: impl FnOnce(&mut State) -> T) -> T {
        let lock = || self.caches.lock().unwrap_or_else(PoisonError::into_inner);
        let free = lock().pop();
        let mut state = free.unwrap_or_else(State::new);
        let result = run(&mut state);
        state.ids.shrink_to(1 << 12); // a long piece may have left much there
        let mut caches = lock();
        if caches.len() < MAX_CACHES {
            caches.push(state);
        }
        result
    }

    fn encode_into(&self, text: &str, state: &mut State, out: &mut impl Output) {
        #[cfg(target_arch = "x86_64")]
        if has_avx2() {
            // SAFETY: the machine has just been asked.
            return unsafe { self.encode_avx2(text, state, out) };
        }
        // SAFETY: every machine has this level.
        unsafe { self.encode_at::<Plain>(text, state, out) }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,bmi1,bmi2,lzcnt,popcnt")]
    fn encode_avx2(&self, text: &str, state: &mut State, out: &mut impl Output) {
        // SAFETY: this function may only be called where the machine has it.
        unsafe { self.encode_at::<Avx2>(text, state, out) }
    }

    /// # Safety
    ///
    /// The machine is of level `L`.
    #[inline(always)]
    unsafe fn encode_at<L: Level>(&self, text: &str, state: &mut State, out: &mut impl Output) {
        match self.pattern.rule() {
            Some(rule) => {
                let blocks = Blocks::new(text, rule);
                // SAFETY: the caller knows the machine.
                let ends = unsafe { BlockEnds::<L>::new(blocks) };
                self.encode_pieces(text, ends, state, out);
            }
            None => self.encode_pieces(text, split(text, self.pattern), state, out),
        }
    }

    #[inline(always)]
    fn encode_pieces(
        &self,
        text: &str,
        mut ends: impl Ends,
        state: &mut State,
        out: &mut impl Output,
    ) {
        let bytes = text.as_bytes();
        let State {
            cache,
            batches,
            ids: of_piece,
        } = state;
        let [mut new, mut old] = batches.each_mut();
        (old.num, old.bounds[0]) = (0, 0);
        let mut ids = [0; INLINE * FULL_BATCH];
        loop {
            new.cut(old.bounds[old.num], &mut ends);
            // While the memory for one batch is on its way, the batch before
            // it is looked up.
            new.prepare(bytes, cache);
            let mut num = 0;
            for i in 0..old.num {
                let (key, hash) = old.keys[i];
                let (few, count) = cache.get_first(key, hash);
                ids[num..num + INLINE].copy_from_slice(few);
                num += count;
                if count == 0 {
                    out.many(&ids[..num]);
                    num = 0;
                    let ids = self.missed(key, hash, old.piece(i, bytes), cache, of_piece);
                    out.many(ids);
                }
            }
            out.many(&ids[..num]);
            if new.num == 0 {
                return;
            }
            std::mem::swap(&mut new, &mut old);
        }
    }

    /// The ids of a piece that was not found in the cache at first sight.
    #[inline(never)]
    fn missed<'a>(
        &self,
        key: Key,
        hash: u64,
        piece: &[u8],
        cache: &'a mut Cache,
        ids: &'a mut Vec<u32>,
    ) -> &'a [u32] {
        ids.clear();
        if let Some(known) = cache.get(key, piece) {
            ids.extend_from_slice(known);
            return ids;
        }
        if let Some(id) = self.words.get(hash, piece, &self.tokens) {
            ids.push(id);
        } else if piece.len() > CACHED_BYTES {
            self.long(piece, cache, ids);
            return ids;
        } else {
            self.table.piece(piece, ids);
        }
        if piece.len() <= CACHED_BYTES {
            cache.insert(key, piece, ids);
        }
        ids
    }

    /// A piece too long to be remembered: part by part, and long parts by
    /// windows, so that what repeats in it is found in the cache.
    #[cold]
    fn long(&self, piece: &[u8], cache: &mut Cache, ids: &mut Vec<u32>) {
        let mut rest = piece;
        while !rest.is_empty() {
            let (part, after) = rest.split_at(self.table.first_part(rest));
            rest = after;
            if part.len() <= SHORT {
                self.part(part, cache, ids);
            } else {
                let encode = |window: &[u8], ids: &mut Vec<u32>| self.part(window, cache, ids);
                self.table.windows(part, &self.tokens, ids, encode);
            }
        }
    }

    /// A part or a window of a long piece, looked up like a piece.
    fn part(&self, part: &[u8], cache: &mut Cache, ids: &mut Vec<u32>) {
        if let [byte] = part {
            return ids.push(self.table.byte_id(*byte));
        }
        let key = Key::of(part);
        if self.table.is_ordered() {
            // Else some tokens are only found as whole pieces.
            if let Some(id) = self.words.get(key.hash(), part, &self.tokens) {
                return ids.push(id);
            }
        }
        if part.len() > MAX_CACHED_PART {
            return self.table.piece(part, ids);
        }
        if self.table.is_ordered() {
            if let Some(known) = cache.get(key, part) {
                return ids.extend_from_slice(known);
            }
        }
        let start = ids.len();
        self.table.piece(part, ids);
        if self.table.is_ordered() {
            cache.insert(key, part, &ids[start..]);
        }
    }
}

pub(crate) fn check_size(tokens: usize) -> Result<(), Error> {
    if tokens <= MAX_TOKENS {
        return Ok(());
    }
    let message = format!("{tokens} tokens; there may be {MAX_TOKENS}");
    Err(Error::new(ErrorKind::TooLarge, message))
}

/// `texts` cut into runs of about [`PORTION_BYTES`].
fn portions<S: AsRef<str>>(texts: &[S]) -> Vec<&[S]> {
    let mut portions = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    for (i, text) in texts.iter().enumerate() {
        bytes += text.as_ref().len();
        if bytes >= PORTION_BYTES {
            portions.push(&texts[start..=i]);
            (start, bytes) = (i + 1, 0);
        }
    }
    if start < texts.len() {
        portions.push(&texts[start..]);
    }
    portions
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_impossible_merges() {
        for merges in [vec![(97, 256)], vec![(97, 98), (97, 98)]] {
            let error = Bpe::new(merges, Pattern::Qwen2).err().expect("refused");
            assert_eq!(error.kind(), ErrorKind::InvalidMerges);
        }
        let doubling = (0..40).map(|i| if i == 0 { (97, 97) } else { (255 + i, 255 + i) });
        let error = Bpe::new(doubling.collect(), Pattern::Qwen2)
            .err()
            .expect("refused");
        assert_eq!(error.kind(), ErrorKind::TooLarge);
    }

    #[test]
    fn refuses_unknown_ids() {
        let bpe = Bpe::new(vec![(97, 98)], Pattern::Qwen2).unwrap();
        assert_eq!(bpe.decode(&[256]).unwrap(), b"ab");
        let kind = |error: Error| error.kind();
        assert_eq!(
            bpe.decode(&[257]).map_err(kind),
            Err(ErrorKind::UnknownToken)
        );
        assert_eq!(bpe.token(257).map_err(kind), Err(ErrorKind::UnknownToken));
    }
}
