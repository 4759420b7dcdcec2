//! From ids back to bytes and text.
//!
//! [`Tokens`] holds the bytes of all tokens one after the other; decoding
//! copies them out. [`Decoder`] does it one id at a time for text that is
//! shown while it is generated. `Bpe` calls the former; chat and server, by
//! way of Python, the latter. Neither ever looks at merges or patterns.

use std::ptr;

use crate::error::{Error, ErrorKind};

/// A head holds the first bytes of a token, zeros, and in the last place the
/// token's length, so that decoding copies it whole and looks at nothing else.
const HEAD: usize = 16;
/// In place of the length: the token has more bytes than its head.
const LONG: u8 = u8::MAX;
/// Ids between two looks at whether there is still room for what follows.
const CHUNK: usize = 64;

/// The bytes of every token.
pub(crate) struct Tokens {
    bytes: Vec<u8>,   // all tokens one after the other
    starts: Vec<u32>, // one more than there are tokens
    heads: Vec<[u8; HEAD]>,
}

impl Tokens {
    /// All tokens together may have this many bytes.
    pub(crate) const MAX_BYTES: usize = 1 << 28;

    pub(crate) fn new() -> Tokens {
        Tokens {
            bytes: Vec::new(),
            starts: vec![0],
            heads: Vec::new(),
        }
    }

    /// Appends a token; fails where memory would run out.
    pub(crate) fn push(&mut self, token: &[u8]) -> Result<(), Error> {
        self.check_room(token.len())?;
        self.bytes.extend_from_slice(token);
        self.close();
        Ok(())
    }

    /// Appends the token `left` + `right`.
    pub(crate) fn push_pair(&mut self, left: u32, right: u32) -> Result<(), Error> {
        self.check_room(self.get(left).len() + self.get(right).len())?;
        for part in [left, right] {
            let range = self.range(part);
            self.bytes.extend_from_within(range);
        }
        self.close();
        Ok(())
    }

    fn check_room(&self, len: usize) -> Result<(), Error> {
        if len <= Tokens::MAX_BYTES - self.bytes.len() {
            return Ok(());
        }
        let (token, limit) = (self.len(), Tokens::MAX_BYTES >> 20);
        let message = format!("token {token} has {len} bytes; all together may have {limit} MiB");
        Err(Error::new(ErrorKind::TooLarge, message))
    }

    /// Ends the token that was written behind the others.
    fn close(&mut self) {
        self.starts.push(self.bytes.len() as u32);
        let token = self.get(self.heads.len() as u32);
        let mut head = [0; HEAD];
        if token.len() < HEAD {
            head[..token.len()].copy_from_slice(token);
            head[HEAD - 1] = token.len() as u8;
        } else {
            head[HEAD - 1] = LONG;
        }
        self.heads.push(head);
    }

    /// How many tokens there are.
    pub(crate) fn len(&self) -> usize {
        self.starts.len() - 1
    }

    fn range(&self, id: u32) -> std::ops::Range<usize> {
        self.starts[id as usize] as usize..self.starts[id as usize + 1] as usize
    }

    /// The bytes of a token that exists.
    #[inline]
    pub(crate) fn get(&self, id: u32) -> &[u8] {
        &self.bytes[self.range(id)]
    }

    /// The bytes that `ids` stand for.
    pub(crate) fn decode(&self, ids: &[u32]) -> Result<Vec<u8>, Error> {
        let mut out: Vec<u8> = Vec::with_capacity(5 * ids.len() + HEAD * CHUNK);
        for chunk in ids.chunks(CHUNK) {
            out.reserve(HEAD * CHUNK);
            let mut at = out.len();
            for &id in chunk {
                let Some(head) = self.heads.get(id as usize) else {
                    return Err(self.unknown(id));
                };
                if head[HEAD - 1] == LONG {
                    // SAFETY: the first `at` bytes are written.
                    unsafe { out.set_len(at) };
                    out.extend_from_slice(self.get(id));
                    out.reserve(HEAD * CHUNK);
                    at = out.len();
                    continue;
                }
                // SAFETY: there was room for a whole head for every id of the
                // chunk, and none has moved `at` by more. `out` is an
                // allocation of its own, so that the two never overlap.
                unsafe { ptr::copy_nonoverlapping(head.as_ptr(), out.as_mut_ptr().add(at), HEAD) };
                at += usize::from(head[HEAD - 1]);
            }
            // SAFETY: all bytes below `at` are written: each head left as many
            // as its length, and the next was written right behind them.
            unsafe { out.set_len(at) };
        }
        Ok(out)
    }

    pub(crate) fn unknown(&self, id: u32) -> Error {
        let message = format!("token {id} is not below {}", self.len());
        Error::new(ErrorKind::UnknownToken, message)
    }
}

/// Turns bytes that arrive bit by bit into text, never half a character.
///
/// Bytes that are no UTF-8 become U+FFFD, one for every maximal prefix of a
/// character, as in `String::from_utf8_lossy` and in Python's "replace": all
/// that is pushed and finished is the text of all bytes together.
///
/// ```
/// let mut decoder = fledge_bpe::Decoder::new();
/// assert_eq!(decoder.push(b"caf\xc3"), "caf");
/// assert_eq!(decoder.push(b"\xa9!"), "\u{e9}!");
/// decoder.push(b"\xe2\x82");
/// assert_eq!(decoder.finish(), "\u{fffd}");
/// ```
#[derive(Clone, Debug, Default)]
pub struct Decoder {
    held: Vec<u8>, // the beginning of a character, at most 3 bytes between calls
}

impl Decoder {
    /// A decoder that has seen nothing.
    pub fn new() -> Decoder {
        Decoder::default()
    }

    /// The text that `bytes` complete.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.held.extend_from_slice(bytes);
        let mut text = String::with_capacity(self.held.len());
        let mut rest = self.held.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    text.push_str(std::str::from_utf8(valid).unwrap_or_default());
                    rest = after;
                    let Some(wrong) = error.error_len() else {
                        break; // the rest may still become a character
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &rest[wrong..];
                }
            }
        }
        let done = self.held.len() - rest.len();
        self.held.drain(..done);
        text
    }

    /// The text of what was held back; the decoder is as new afterwards.
    pub fn finish(&mut self) -> String {
        let held = std::mem::take(&mut self.held);
        if held.is_empty() {
            String::new()
        } else {
            char::REPLACEMENT_CHARACTER.into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tokens(list: &[&[u8]]) -> Tokens {
        let mut tokens = Tokens::new();
        for &token in list {
            tokens.push(token).unwrap();
        }
        tokens
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

        #[test]
        fn decoding_joins_the_tokens(
            list in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 1..20),
            picks in prop::collection::vec(any::<prop::sample::Index>(), 0..60),
        ) {
            let slices: Vec<&[u8]> = list.iter().map(Vec::as_slice).collect();
            let tokens = tokens(&slices);
            let ids: Vec<u32> = picks.iter().map(|p| p.index(list.len()) as u32).collect();
            let naive: Vec<u8> = ids.iter().flat_map(|&id| list[id as usize].clone()).collect();
            prop_assert_eq!(tokens.decode(&ids).unwrap(), naive);
        }

        #[test]
        fn pieces_of_bytes_give_the_text_of_the_whole(
            mut bytes in prop_oneof![
                any::<String>().prop_map(String::into_bytes),
                prop::collection::vec(any::<u8>(), 0..40),
                prop::collection::vec(prop::sample::select(
                    b"a\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\xed\xa0\xf4\x90".to_vec()), 0..40),
            ],
            cuts in prop::collection::vec(0usize..5, 0..40),
        ) {
            let expected = String::from_utf8_lossy(&bytes).into_owned();
            let mut decoder = Decoder::new();
            let mut text = String::new();
            for cut in cuts {
                let rest = bytes.split_off(cut.min(bytes.len()));
                text += &decoder.push(&bytes);
                bytes = rest;
            }
            text += &decoder.push(&bytes);
            text += &decoder.finish();
            prop_assert_eq!(text, expected);
            prop_assert_eq!(decoder.finish(), "");
        }
    }

    #[test]
    fn refuses_unknown_ids_and_too_many_bytes() {
        let mut tokens = tokens(&[b"a"]);
        let kind = tokens.decode(&[0, 1]).unwrap_err().kind();
        assert_eq!(kind, ErrorKind::UnknownToken);
        let mut id = 0;
        let error = loop {
            match tokens.push_pair(id, id) {
                Ok(()) => id += 1,
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), ErrorKind::TooLarge);
        assert_eq!(tokens.get(1), b"aa");
    }
}
