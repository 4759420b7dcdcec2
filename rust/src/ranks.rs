//! A BPE from ranks of byte strings, as tiktoken has it.
//!
//! A tiktoken file is no list of merges: it gives every token a rank, and any
//! two neighbours join whose bytes together are a token, the lowest rank first;
//! a piece that is a token is that token. Where every token is made of two
//! tokens of lower rank (which is what training leaves) both are the same, for
//! then each token comes about in one way only, and `from_ranks` finds the
//! merges. Where a token is not, all ways in which two tokens make a third are
//! kept, and long pieces go without windows, whose proof needs rising ranks.
//!
//! Called by the Python module to load other people's vocabularies. Encoding
//! itself is in `encode`.

use rustc_hash::FxHashMap;

use crate::decode::Tokens;
use crate::encode::{check_size, Bpe};
use crate::error::{Error, ErrorKind};
use crate::merge::Merges;
use crate::split::Pattern;
use crate::words::Words;

impl Bpe {
    /// A BPE from the bytes of every token and its rank, which is its id.
    ///
    /// Gives the ids of tiktoken's `encode_ordinary`. Fails, and says at which
    /// rank, if ranks are not 0, 1, 2, ... each once (in any order), if two
    /// tokens have the same bytes, if one has none, or if a single byte is no
    /// token.
    ///
    /// ```
    /// use fledge_bpe::{Bpe, Pattern};
    ///
    /// let mut ranks: Vec<(Vec<u8>, u32)> = (0..=255).map(|b| (vec![b as u8], b)).collect();
    /// ranks.push((b"ab".to_vec(), 256));
    /// let bpe = Bpe::from_ranks(ranks, Pattern::Qwen2)?;
    /// assert_eq!(bpe.encode("cab"), [b'c' as u32, 256]);
    /// # Ok::<(), fledge_bpe::Error>(())
    /// ```
    pub fn from_ranks(mut ranks: Vec<(Vec<u8>, u32)>, pattern: Pattern) -> Result<Bpe, Error> {
        check_size(ranks.len())?;
        ranks.sort_by_key(|&(_, rank)| rank);
        let wrong = |message: String| Error::new(ErrorKind::InvalidRanks, message);
        let mut tokens = Tokens::new();
        let mut ids: FxHashMap<&[u8], u32> = FxHashMap::default();
        for (i, (bytes, rank)) in ranks.iter().enumerate() {
            let expected = i as u32;
            if *rank < expected {
                return Err(wrong(format!("rank {rank} occurs twice")));
            }
            if *rank > expected {
                return Err(wrong(format!(
                    "rank {expected} is missing; the next is {rank}"
                )));
            }
            if bytes.is_empty() {
                return Err(wrong(format!("the token of rank {rank} has no bytes")));
            }
            tokens.push(bytes)?;
            if let Some(other) = ids.insert(bytes, *rank) {
                let bytes = bytes.escape_ascii();
                return Err(wrong(format!(
                    "ranks {other} and {rank} are both b\"{bytes}\""
                )));
            }
        }
        let mut byte_ids = [0; 256];
        for byte in 0..=255u8 {
            let Some(&id) = ids.get(&[byte][..]) else {
                return Err(wrong(format!("no token is the single byte 0x{byte:02x}")));
            };
            byte_ids[usize::from(byte)] = id;
        }
        let mut words = Words::new(tokens.len());
        for id in 0..tokens.len() as u32 {
            words.insert(id, &tokens);
        }
        let (tokens_ref, ids_ref) = (&tokens, &ids);
        let halves = |id: u32| {
            let bytes = tokens_ref.get(id);
            (1..bytes.len()).filter_map(move |at| {
                let (left, right) = bytes.split_at(at);
                Some((*ids_ref.get(left)?, *ids_ref.get(right)?, id))
            })
        };
        let all: Vec<_> = (0..tokens.len() as u32).flat_map(halves).collect();
        let table = Merges::new(byte_ids, &all, &tokens, false)?;
        // The last merge of every token, if it is the only way to it.
        let mut last = Vec::new();
        let mut made = Vec::new();
        for id in 0..tokens.len() as u32 {
            let bytes = tokens.get(id);
            if bytes.len() < 2 {
                continue;
            }
            made.clear();
            table.heap_below(id, bytes, &mut made);
            match made[..] {
                [left, right] => last.push((left, right, id)),
                _ => return Ok(Bpe::from_parts(pattern, Vec::new(), tokens, table, words)),
            }
        }
        let table = Merges::new(byte_ids, &last, &tokens, true)?;
        Ok(Bpe::from_parts(pattern, Vec::new(), tokens, table, words))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_bytes(more: &[(&[u8], u32)]) -> Vec<(Vec<u8>, u32)> {
        let bytes = (0..=255u8).map(|b| (vec![b], b.into()));
        bytes
            .chain(more.iter().map(|(b, r)| (b.to_vec(), *r)))
            .collect()
    }

    fn refusal(ranks: Vec<(Vec<u8>, u32)>) -> String {
        let error = Bpe::from_ranks(ranks, Pattern::Qwen2)
            .err()
            .expect("refused");
        assert_eq!(error.kind(), ErrorKind::InvalidRanks);
        error.to_string()
    }

    #[test]
    fn refusals_say_where() {
        assert!(refusal(with_bytes(&[(b"ab", 255)])).contains("rank 255 occurs twice"));
        assert!(refusal(with_bytes(&[(b"ab", 258)])).contains("rank 256 is missing"));
        assert!(refusal(with_bytes(&[(b"ab", 256), (b"ab", 257)])).contains("256 and 257"));
        assert!(refusal(with_bytes(&[(b"", 256)])).contains("rank 256 has no bytes"));
        let mut ranks = with_bytes(&[]);
        ranks[7].0 = b"ab".to_vec();
        assert!(refusal(ranks).contains("0x07"));
        assert!(refusal(Vec::new()).contains("0x00"));
    }
}
