//! Which partition an event belongs to: the same answer on every broker.

use std::num::NonZeroU32;

use crate::Event;

/// The partition of `event` in a topic of `partitions`.
///
/// Events of one key share a partition. An event without key may go to any; its id decides, so that publishing it
/// again reaches the same one.
pub fn partition_of(event: &Event, partitions: NonZeroU32) -> u32 {
    partition_of_key(event.key().unwrap_or(event.id()).as_bytes(), partitions)
}

/// The partition of `key`: `(murmur2(key) & 0x7fffffff) mod partitions`.
///
/// # Source
///
/// Kafka's default partitioner for records with a key, bit for bit.
pub fn partition_of_key(key: &[u8], partitions: NonZeroU32) -> u32 {
    (murmur2(key) & 0x7fff_ffff) % partitions
}

/// The 32-bit hash of Kafka's Java client (`org.apache.kafka.common.utils.Utils.murmur2`).
pub fn murmur2(bytes: &[u8]) -> u32 {
    const SEED: u32 = 0x9747_b28c;
    const MULTIPLIER: u32 = 0x5bd1_e995;
    const SHIFT: u32 = 24;

    // Kafka hashes at most 2 GiB, so the length fits; ours are at most 1 KiB.
    let mut hash = SEED ^ bytes.len() as u32;
    let words = bytes.chunks_exact(4);
    let rest = words.remainder();
    for word in words {
        let mut k = u32::from_le_bytes([word[0], word[1], word[2], word[3]]).wrapping_mul(MULTIPLIER);
        k ^= k >> SHIFT;
        hash = hash.wrapping_mul(MULTIPLIER) ^ k.wrapping_mul(MULTIPLIER);
    }
    if !rest.is_empty() {
        for (index, byte) in rest.iter().enumerate() {
            hash ^= u32::from(*byte) << (8 * index);
        }
        hash = hash.wrapping_mul(MULTIPLIER);
    }
    hash ^= hash >> 13;
    hash = hash.wrapping_mul(MULTIPLIER);
    hash ^ (hash >> 15)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Source: Apache Kafka, `UtilsTest.testMurmur2`; the empty key and the non-ASCII ones were read off librdkafka
    /// and the Java client, which agree (`broker-facts.md` 3.2).
    #[test]
    fn equals_kafkas_vectors() {
        let vectors: [(&[u8], i32); 6] = [
            (b"21", -973_932_308),
            (b"foobar", -790_332_482),
            (b"a-little-bit-long-string", -985_981_536),
            (b"a-little-bit-longer-string", -1_486_304_829),
            (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58_897_971),
            (b"abc", 479_470_107),
        ];
        for (key, hash) in vectors {
            assert_eq!(murmur2(key) as i32, hash, "{}", String::from_utf8_lossy(key));
        }
    }

    #[test]
    fn a_key_stays_in_one_partition_and_keys_spread() {
        let eight = NonZeroU32::new(8).unwrap();
        let mut counts = [0; 8];
        for n in 0..8_000 {
            let key = format!("order-{n}");
            let partition = partition_of_key(key.as_bytes(), eight);
            assert_eq!(partition, partition_of_key(key.as_bytes(), eight));
            counts[partition as usize] += 1;
        }
        assert!(counts.iter().all(|count| (800..1_200).contains(count)), "{counts:?}");
    }
}
