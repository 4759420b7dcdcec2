//! What a step is asked for: checked, and its attention cut into tasks.
//!
//! After this nothing else is checked: the kernels read and write where the
//! plan says. Used by `step`.

use crate::error::Error;
use crate::nn::kernels::chunk;
use crate::nn::pack::{invalid, Shape};

/// Keys and values of a number of sequences: of each layer [slots, kv_heads, max_len, head_dim].
pub struct Cache {
    keys: Vec<*mut f32>,
    values: Vec<*mut f32>,
    slots: usize,
    max_len: usize,
}

// SAFETY: a cache is only memory; who may use it when is the promise made to `Cache::new`.
unsafe impl Send for Cache {}
// SAFETY: as above.
unsafe impl Sync for Cache {}

impl Cache {
    /// A cache in the memory of somebody else.
    ///
    /// # Safety
    ///
    /// Each pointer has `slots` x kv_heads x `max_len` x head_dim initialised or never-read
    /// floats of the model that the cache is used with, which live as long as this value and are
    /// used by nobody else during a step.
    pub unsafe fn new(
        keys: Vec<*mut f32>,
        values: Vec<*mut f32>,
        slots: usize,
        max_len: usize,
    ) -> Cache {
        Cache {
            keys,
            values,
            slots,
            max_len,
        }
    }

    /// Where keys (and values) of a head begin in a layer.
    pub(crate) fn place(&self, s: &Shape, slot: usize, head: usize, position: usize) -> usize {
        ((slot * s.kv_heads + head) * self.max_len + position) * s.head_dim
    }

    pub(crate) fn layer(&self, index: usize) -> (*mut f32, *mut f32) {
        (self.keys[index], self.values[index])
    }
}

/// Positions `start..end` of a sequence, stored at those places of `slot`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Part {
    pub slot: usize,
    pub start: usize,
    pub end: usize,
}

/// One token to be read: the sequence stands in `parts`, then from there on in the own slot.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Row {
    pub token: usize,
    pub slot: usize,
    pub position: usize,
    pub parts: Vec<Part>,
}

/// Attention of the heads that share one key head of one row, over at most [`chunk`] keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Task {
    pub row: usize,
    pub head: usize, // of the keys
    pub slot: usize,
    pub start: usize,
    pub count: usize,
    /// Which of the row's partial results this is.
    pub index: usize,
    /// It holds the row's newest position, which is written first.
    pub newest: bool,
}

impl Task {
    /// Whether another task reads the very keys that this one does.
    pub(crate) fn same_keys(&self, other: &Task) -> bool {
        let keys = |task: &Task| (task.head, task.slot, task.start, task.count);
        keys(self) == keys(other)
    }
}

/// The tasks of every layer of one step.
pub(crate) struct Plan {
    pub tasks: Vec<Task>,
    /// Where the partial results of each row begin, and one more: how many there are.
    pub first_part: Vec<usize>,
}

impl Plan {
    pub(crate) fn new(s: &Shape, cache: &Cache, rows: &[Row]) -> Result<Plan, Error> {
        check(s, cache, rows)?;
        let chunk = chunk(s.head_dim);
        let mut first_part = vec![0];
        let mut tasks = Vec::new();
        for (r, row) in rows.iter().enumerate() {
            let base = row.parts.last().map_or(0, |part| part.end);
            let own = Part {
                slot: row.slot,
                start: base,
                end: row.position + 1,
            };
            let mut index = 0;
            for (p, part) in row.parts.iter().chain([&own]).enumerate() {
                let mut start = part.start;
                while start < part.end {
                    let count = chunk.min(part.end - start);
                    let newest = p == row.parts.len() && start + count == part.end;
                    let slot = part.slot;
                    tasks.push(Task {
                        row: r,
                        head: 0,
                        slot,
                        start,
                        count,
                        index,
                        newest,
                    });
                    start += count;
                    index += 1;
                }
            }
            first_part.push(first_part[r] + index);
        }
        // rows that read the same keys do so one after the other: only the first waits for memory
        tasks.sort_by_key(|task| (task.slot, task.start, task.row));
        let tasks = (0..s.kv_heads)
            .flat_map(|head| tasks.iter().map(move |task| Task { head, ..*task }))
            .collect();
        Ok(Plan { tasks, first_part })
    }
}

fn check(s: &Shape, cache: &Cache, rows: &[Row]) -> Result<(), Error> {
    if cache.keys.len() != s.layers || cache.values.len() != s.layers {
        return Err(invalid(format!(
            "the cache is not one of {} layers",
            s.layers
        )));
    }
    if rows.is_empty() {
        return Err(invalid("a step without rows"));
    }
    let mut writes = Vec::with_capacity(rows.len());
    for row in rows {
        if row.token >= s.vocab_size {
            return Err(invalid(format!("token {} of {}", row.token, s.vocab_size)));
        }
        let limit = cache.max_len.min(s.positions);
        if row.slot >= cache.slots || row.position >= limit {
            let Row { slot, position, .. } = row;
            return Err(invalid(format!(
                "position {position} of slot {slot}; there are {} slots of {limit}",
                cache.slots
            )));
        }
        let mut end = 0;
        for part in &row.parts {
            if part.slot >= cache.slots || part.start != end || part.end <= part.start {
                return Err(invalid(format!("{part:?} does not follow position {end}")));
            }
            end = part.end;
        }
        if end > row.position {
            return Err(invalid(format!(
                "position {} lies in a shared part",
                row.position
            )));
        }
        writes.push((row.slot, row.position));
    }
    writes.sort_unstable();
    if writes.windows(2).any(|two| two[0].0 == two[1].0) {
        return Err(invalid("two rows in one slot"));
    }
    for part in rows.iter().flat_map(|row| &row.parts) {
        if let Ok(at) = writes.binary_search_by_key(&part.slot, |write| write.0) {
            if (part.start..part.end).contains(&writes[at].1) {
                return Err(invalid(format!("{part:?} is being written")));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape {
        vocab_size: 10,
        hidden_size: 4,
        layers: 1,
        heads: 4,
        kv_heads: 2,
        head_dim: 2,
        inner: 4,
        positions: 400,
        eps: 1e-6,
    };

    fn plan(rows: &[Row]) -> Result<Plan, Error> {
        let null = std::ptr::null_mut();
        // SAFETY: nothing is read here.
        let cache = unsafe { Cache::new(vec![null], vec![null], 3, 300) };
        Plan::new(&SHAPE, &cache, rows)
    }

    fn row(token: usize, slot: usize, position: usize, parts: &[(usize, usize, usize)]) -> Row {
        let part = |&(slot, start, end)| Part { slot, start, end };
        Row {
            token,
            slot,
            position,
            parts: parts.iter().map(part).collect(),
        }
    }

    #[test]
    fn every_position_of_every_row_is_read_once_by_every_key_head() {
        let rows = [
            row(1, 0, 9, &[]),
            row(2, 1, 290, &[(2, 0, 200), (0, 200, 205)]),
        ];
        assert!(plan(&rows[1..]).is_ok());
        let plan = plan(&[row(1, 0, 9, &[]), row(2, 1, 290, &[(2, 0, 200)])]).unwrap();
        assert_eq!(plan.first_part, [0, 1, 4]);
        for head in 0..2 {
            let of_head = |task: &&Task| task.head == head;
            let mut seen: Vec<_> = plan.tasks.iter().filter(of_head).copied().collect();
            seen.sort_by_key(|task| (task.row, task.index));
            let got: Vec<_> = seen
                .iter()
                .map(|t| (t.row, t.slot, t.start, t.count, t.newest))
                .collect();
            let expected = [
                (0, 0, 0, 10, true),
                (1, 2, 0, 128, false),
                (1, 2, 128, 72, false),
                (1, 1, 200, 91, true),
            ];
            assert_eq!(got, expected);
        }
    }

    #[test]
    fn what_is_not_there_is_refused() {
        for (rows, word) in [
            (vec![], "without rows"),
            (vec![row(10, 0, 0, &[])], "token 10"),
            (vec![row(1, 3, 0, &[])], "slot 3"),
            (vec![row(1, 0, 300, &[])], "position 300"),
            (vec![row(1, 0, 5, &[(1, 1, 3)])], "follow position 0"),
            (
                vec![row(1, 0, 5, &[(1, 0, 3), (1, 2, 4)])],
                "follow position 3",
            ),
            (vec![row(1, 0, 5, &[(1, 0, 0)])], "follow position 0"),
            (vec![row(1, 0, 5, &[(3, 0, 2)])], "follow position 0"),
            (vec![row(1, 0, 5, &[(1, 0, 6)])], "shared part"),
            (vec![row(1, 0, 5, &[]), row(1, 0, 6, &[])], "one slot"),
            (
                vec![row(1, 0, 5, &[]), row(1, 1, 9, &[(0, 0, 6)])],
                "being written",
            ),
        ] {
            let error = plan(&rows).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(error.contains(word), "{error:?} without {word:?}");
        }
    }
}
