//! Balancing tables: computed when hosts or their health change, only read when a request picks.
//!
//! Priorities take load as Envoy spreads it: a priority's health is its healthy share times the
//! overprovisioning factor, and each takes up to that percentage of what those before it left. Below the
//! panic threshold health is ignored, since most of a cluster failing more often means that the checks are
//! wrong than that spreading the rest over few hosts would help.

use std::{
    collections::BTreeMap,
    hash::Hasher,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use mesh_model::proxy as model;

use super::{
    host::{Check, Health, Host, now_ms},
    schedule::Schedule,
};

/// Longest weighted round-robin sequence; weights are scaled down to it.
const MAX_SEQUENCE: u64 = 1024;

/// Source of randomness of one worker (`wyrand`); not for secrets.
#[derive(Debug, Clone)]
pub(crate) struct Rng(std::cell::Cell<u64>);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(std::cell::Cell::new(seed))
    }

    pub(crate) fn next(&self) -> u64 {
        let s = self.0.get().wrapping_add(0xa076_1d64_78bd_642f);
        self.0.set(s);
        let t = u128::from(s) * u128::from(s ^ 0xe703_7ed1_a0b4_28db);
        (t ^ (t >> 64)) as u64
    }

    /// True in `n` of a million cases.
    pub(crate) fn chance_ppm(&self, n: u32) -> bool {
        n >= 1_000_000 || (n > 0 && self.next() % 1_000_000 < u64::from(n))
    }
}

/// A hash that is the same in every process, so that all proxies agree on a ring.
pub(crate) fn stable_hash(bytes: &[u8]) -> u64 {
    struct Fnv(u64);
    impl Hasher for Fnv {
        fn finish(&self) -> u64 {
            // Murmur's finaliser: FNV alone leaves the high bits of short keys alike.
            let mut h = self.0;
            h ^= h >> 33;
            h = h.wrapping_mul(0xff51_afd7_ed55_8ccd);
            h ^= h >> 33;
            h = h.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
            h ^ (h >> 33)
        }
        fn write(&mut self, bytes: &[u8]) {
            for b in bytes {
                self.0 = (self.0 ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3);
            }
        }
    }
    let mut h = Fnv(0xcbf2_9ce4_8422_2325);
    h.write(bytes);
    h.finish()
}

#[derive(Debug)]
enum Policy {
    /// Positions into hosts in turn.
    Sequence(Vec<u32>, AtomicUsize),
    /// Cumulative weights.
    Random(Vec<u64>),
    /// Of so many random hosts.
    LeastRequest(u32),
    Earliest(Schedule),
    PeakEwma(Vec<u64>),
    /// Sorted points of a ring.
    Ring(Vec<(u64, u32)>),
    Maglev(Vec<u32>),
}

/// Hosts to choose from by one policy.
#[derive(Debug)]
struct Table {
    hosts: Vec<Arc<Host>>,
    policy: Policy,
}

/// Scale of weights while hosts are new.
const SLOW_SCALE: f64 = 100.0;

/// Weights of hosts, less where slow start holds back those that are new.
fn weights(hosts: &[Arc<Host>], c: &LbConfig) -> Vec<u64> {
    let plain = |h: &Arc<Host>| u64::from(h.weight);
    if let Some((blackout, expiration)) = c.reports {
        return reported(hosts, c.now, blackout, expiration);
    }
    let Some(slow) = c.slow_start else { return hosts.iter().map(plain).collect() };
    if !hosts.iter().any(|h| c.is_new(h)) {
        return hosts.iter().map(plain).collect();
    }
    let weight = |h: &Arc<Host>| {
        let age = c.now.saturating_sub(h.stats.healthy_since.load(Relaxed)).max(1) as f64;
        let share = (age / (slow.window.as_secs_f64() * 1000.0)).min(1.0);
        let share = share.powf(1000.0 / f64::from(slow.aggression.max(1)));
        let share = share.max(f64::from(slow.min_weight) / 10_000.0).min(1.0);
        ((f64::from(h.weight) * SLOW_SCALE * share).round() as u64).max(1)
    };
    hosts.iter().map(weight).collect()
}

/// Weights of hosts by what they say of their load. Who says nothing has the median of the others, and without any all
/// have their own.
fn reported(hosts: &[Arc<Host>], now: u64, blackout: u64, expiration: u64) -> Vec<u64> {
    let all: Vec<Option<f64>> =
        hosts.iter().map(|h| h.stats.load.weight(now, blackout, expiration)).collect();
    let mut known: Vec<f64> = all.iter().flatten().copied().collect();
    known.sort_by(f64::total_cmp);
    let Some(median) = known.get(known.len() / 2).copied() else {
        return hosts.iter().map(|h| u64::from(h.weight)).collect();
    };
    // In thousandths, and no more than sums can hold.
    let scaled = |w: Option<f64>| ((w.unwrap_or(median) * 1000.0).min(1e12) as u64).max(1);
    all.into_iter().map(scaled).collect()
}

fn cumulative(weights: &[u64]) -> Vec<u64> {
    weights
        .iter()
        .scan(0u64, |sum, w| {
            *sum += w;
            Some(*sum)
        })
        .collect()
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Smooth weighted round robin, laid out once.
fn sequence(weights: &[u64]) -> Vec<u32> {
    let divisor = weights.iter().fold(0, |g, w| gcd(*w, g)).max(1);
    let mut weights: Vec<u64> = weights.iter().map(|w| w / divisor).collect();
    let limit = MAX_SEQUENCE.max(weights.len() as u64 * 8);
    let total: u64 = weights.iter().sum();
    if total > limit {
        for w in &mut weights {
            *w = (*w * limit / total).max(1);
        }
    }
    let total: i64 = weights.iter().sum::<u64>() as i64;
    if weights.iter().all(|w| *w == 1) {
        return (0..weights.len() as u32).collect();
    }
    let mut current = vec![0i64; weights.len()];
    (0..total)
        .map(|_| {
            let mut best = 0;
            for i in 0..current.len() {
                current[i] += weights[i] as i64;
                if current[i] > current[best] {
                    best = i;
                }
            }
            current[best] -= total;
            best as u32
        })
        .collect()
}

/// Largest ring, as Envoy's `maximum_ring_size`.
const MAX_RING: u64 = 8 * 1024 * 1024;

/// A ring of at least `min_size` points. Points for each unit of weight are a power of two, so that a host that
/// leaves or joins seldom changes how many the others have, and then moves no keys between those.
fn ring(hosts: &[Arc<Host>], min_size: u64) -> Vec<(u64, u32)> {
    let size = min_size.clamp(hosts.len() as u64, MAX_RING);
    let total: u64 = hosts.iter().map(|h| u64::from(h.weight)).sum::<u64>().max(1);
    let mut each = 1.0;
    while each * total as f64 > size as f64 {
        each /= 2.0;
    }
    while each * (total as f64) < size as f64 && each * total as f64 * 2.0 <= MAX_RING as f64 {
        each *= 2.0;
    }
    let mut points = Vec::with_capacity(size as usize + hosts.len());
    for (i, h) in hosts.iter().enumerate() {
        let name = h.hash_name();
        let n = (each * f64::from(h.weight)).ceil() as u64;
        for k in 0..n {
            points.push((stable_hash(format!("{name}_{k}").as_bytes()), i as u32));
        }
    }
    points.sort_unstable();
    points
}

fn maglev(hosts: &[Arc<Host>], size: u64) -> Vec<u32> {
    // Any size at least as large as the hosts works; primes make every permutation reach every slot.
    let m = next_prime(size.clamp(hosts.len() as u64 + 2, 5_000_011));
    let max = hosts.iter().map(|h| h.weight).max().unwrap_or(1);
    let mut rows: Vec<(u64, u64, u64, f64)> = hosts
        .iter()
        .map(|h| {
            let hash = stable_hash(h.hash_name().as_bytes());
            (hash % m, (hash >> 32) % (m - 1) + 1, 0, 0.0)
        })
        .collect();
    let mut table = vec![u32::MAX; m as usize];
    let mut filled = 0;
    let mut turn = 0.0;
    while filled < m {
        turn += 1.0;
        for (i, (offset, skip, next, target)) in rows.iter_mut().enumerate() {
            let share = f64::from(hosts[i].weight) / f64::from(max);
            if turn * share < *target {
                continue;
            }
            *target += 1.0;
            loop {
                let slot = ((*offset + *skip * *next) % m) as usize;
                *next += 1;
                if table[slot] == u32::MAX {
                    table[slot] = i as u32;
                    filled += 1;
                    break;
                }
            }
            if filled == m {
                break;
            }
        }
    }
    table
}

fn next_prime(mut n: u64) -> u64 {
    let is_prime = |n: u64| n >= 2 && (2..).take_while(|d| d * d <= n).all(|d| !n.is_multiple_of(d));
    while !is_prime(n) {
        n += 1;
    }
    n
}

impl Table {
    fn new(hosts: Vec<Arc<Host>>, c: &LbConfig, seed: u64) -> Self {
        let policy = match c.policy {
            _ if hosts.is_empty() => Policy::Random(vec![]),
            model::LbPolicy::RoundRobin | model::LbPolicy::Utilization => {
                let s = sequence(&weights(&hosts, c));
                let start = (seed % s.len().max(1) as u64) as usize;
                Policy::Sequence(s, AtomicUsize::new(start))
            }
            model::LbPolicy::LeastRequest(l) => {
                let weights = weights(&hosts, c);
                if weights.iter().all(|w| *w == weights[0]) {
                    Policy::LeastRequest(l.choices)
                } else {
                    Policy::Earliest(Schedule::new(&weights, l.bias, seed))
                }
            }
            model::LbPolicy::PeakEwma => Policy::PeakEwma(cumulative(&weights(&hosts, c))),
            model::LbPolicy::Random => {
                Policy::Random(cumulative(&hosts.iter().map(|h| u64::from(h.weight)).collect::<Vec<_>>()))
            }
            model::LbPolicy::RingHash(n) => Policy::Ring(ring(&hosts, n)),
            model::LbPolicy::Maglev(n) => Policy::Maglev(maglev(&hosts, n)),
        };
        Self { hosts, policy }
    }

    fn pick(&self, rng: &Rng, hash: Option<u64>) -> Option<&Arc<Host>> {
        let weighted = |c: &[u64]| {
            let at = rng.next() % c.last().copied().unwrap_or(1).max(1);
            c.partition_point(|sum| *sum <= at)
        };
        let at = match &self.policy {
            Policy::Sequence(s, cursor) => *s.get(cursor.fetch_add(1, Relaxed) % s.len().max(1))? as usize,
            Policy::Random(c) => weighted(c),
            Policy::LeastRequest(choices) => {
                // Hosts are fewer than 2^32 and a pick is never made of none.
                let any = || (rng.next() % self.hosts.len().max(1) as u64) as usize;
                let load = |i: usize| self.hosts.get(i).map_or(u32::MAX, |h| h.stats.active.load(Relaxed));
                let mut best = any();
                let mut least = load(best);
                for _ in 1..*choices {
                    let other = any();
                    let l = load(other);
                    if l < least {
                        (best, least) = (other, l);
                    }
                }
                best
            }
            Policy::Earliest(s) => s.pick(rng, &self.hosts),
            Policy::PeakEwma(c) => {
                let a = weighted(c);
                // Two different hosts where there are two: a slow one must not win against itself.
                let b = (0..4).map(|_| weighted(c)).find(|b| *b != a).unwrap_or(a);
                let now = now_ms();
                let cost = |i: usize| {
                    self.hosts
                        .get(i)
                        .map_or(f32::MAX, |h| h.stats.ewma.cost(now, h.stats.active.load(Relaxed)))
                };
                if cost(b) < cost(a) { b } else { a }
            }
            Policy::Ring(points) => {
                let h = hash.unwrap_or_else(|| rng.next());
                let at = points.partition_point(|p| p.0 < h);
                points.get(at).or_else(|| points.first())?.1 as usize
            }
            Policy::Maglev(t) => {
                let h = hash.unwrap_or_else(|| rng.next());
                *t.get((h % t.len().max(1) as u64) as usize)? as usize
            }
        };
        self.hosts.get(at)
    }
}

/// Hosts of one priority that are as healthy as each other.
#[derive(Debug)]
struct Priority {
    /// Percent of all load.
    load: u64,
    /// Its number.
    level: u32,
    /// Percent of all load that it could take.
    able: u64,
    /// One table, or one for each locality with its share.
    tables: Vec<(u64, Table)>,
    total: u64,
}

impl Priority {
    fn pick(&self, rng: &Rng, hash: Option<u64>) -> Option<&Arc<Host>> {
        let table = match self.tables.as_slice() {
            [] => return None,
            [(_, only)] => only,
            several => {
                let mut at = hash.unwrap_or_else(|| rng.next()) % self.total.max(1);
                &several
                    .iter()
                    .find(|(w, _)| {
                        if at < *w {
                            return true;
                        }
                        at -= w;
                        false
                    })?
                    .1
            }
        };
        table.pick(rng, hash)
    }
}

/// Everything that a pick needs.
#[derive(Debug, Default)]
pub(crate) struct LbTables {
    /// All hosts, whatever their health.
    pub(crate) hosts: Vec<Arc<Host>>,
    priorities: Vec<Priority>,
    /// Usable hosts by the slot that they serve, if any serves one.
    slots: Slots,
}

/// Hosts by slot, in the order of slots: most clusters have none, and there may be thousands of clusters.
type Slots = Box<[(u32, Vec<Arc<Host>>)]>;

fn slots(hosts: &[Arc<Host>]) -> Slots {
    let mut out: BTreeMap<u32, Vec<Arc<Host>>> = BTreeMap::new();
    for h in hosts {
        if let model::Slots::Serves(all) = &h.slots {
            for slot in all {
                out.entry(*slot).or_default().push(Arc::clone(h));
            }
        }
    }
    out.into_iter().collect()
}

/// A server name as it is for all slots.
pub(crate) fn without_slot(server_name: &str) -> &str {
    if slot_of(server_name).is_some() { server_name.get(9..).unwrap_or(server_name) } else { server_name }
}

/// Picks by chance of a host that was not tried, before what is left is looked through.
const UNTRIED_PICKS: u32 = 5;

/// The slot in `0000beef.outbound_.9080_._.reviews…`.
fn slot_of(server_name: &str) -> Option<u32> {
    let (slot, rest) = server_name.split_once('.')?;
    // `from_str_radix` would take a sign.
    let hex = slot.len() == 8 && slot.bytes().all(|b| b.is_ascii_hexdigit());
    (hex && rest.starts_with("outbound_.")).then(|| u32::from_str_radix(slot, 16).ok())?
}

/// What the tables are made from, besides the hosts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LbConfig {
    pub(crate) policy: model::LbPolicy,
    pub(crate) panic_threshold: u32,
    pub(crate) locality_weighted: bool,
    pub(crate) overprovisioning: u32,
    pub(crate) slow_start: Option<model::SlowStart>,
    /// Weights are what hosts report: for how long before one counts, and for how long it then does, in milliseconds.
    pub(crate) reports: Option<(u64, u64)>,
    /// Of [`now_ms`].
    pub(crate) now: u64,
}

impl LbConfig {
    /// Slow start holds the host back.
    pub(crate) fn is_new(&self, h: &Host) -> bool {
        self.slow_start.is_some_and(|s| {
            let age = self.now.saturating_sub(h.stats.healthy_since.load(Relaxed));
            u128::from(age) < s.window.as_millis()
        })
    }
}

/// Hosts of one priority by their health.
struct Group {
    /// All that traffic may go to in a panic.
    all: Vec<Arc<Host>>,
    healthy: Vec<Arc<Host>>,
    degraded: Vec<Arc<Host>>,
    /// How many are the whole of which shares are taken.
    counted: usize,
}

/// Whether a host is part of the whole of which shares are taken.
fn counts(h: &Host) -> bool {
    !h.stats.has(Check::Pending) && !h.stats.has(Check::Excluded)
}

impl Group {
    fn new(hosts: &[Arc<Host>], priority: u32) -> Self {
        let usable = |h: &&Arc<Host>| h.health != model::EndpointHealth::Draining;
        let all: Vec<_> = hosts.iter().filter(|h| h.priority == priority).filter(usable).cloned().collect();
        let of = |health| all.iter().filter(|h| h.health() == health).cloned().collect();
        Self {
            healthy: of(Health::Healthy),
            degraded: of(Health::Degraded),
            counted: all.iter().filter(|h| counts(h)).count(),
            all,
        }
    }
}

impl LbTables {
    /// `locality_weights` by locality index of the hosts.
    pub(crate) fn new(hosts: Vec<Arc<Host>>, locality_weights: &[u32], c: LbConfig, seed: u64) -> Self {
        let factor = u64::from(if c.overprovisioning == 0 { 140 } else { c.overprovisioning });
        let levels = hosts.iter().map(|h| h.priority + 1).max().unwrap_or(0);
        let health = |n: usize, of: usize| if of == 0 { 0 } else { (factor * n as u64 / of as u64).min(100) };
        let groups: Vec<Group> = (0..levels).map(|p| Group::new(&hosts, p)).collect();
        // What healthy hosts of each priority can take, then what degraded ones can.
        let able = |n: fn(&Group) -> usize| groups.iter().map(move |g| (n(g), g.counted));
        let able: Vec<u64> = able(|g| g.healthy.len())
            .chain(able(|g| g.degraded.len()))
            .map(|(n, of)| health(n, of))
            .collect();
        let total: u64 = able.iter().sum::<u64>().min(100);
        let mut panics: Vec<bool> = groups
            .iter()
            .map(|g| {
                let usable = g.healthy.len() + g.degraded.len();
                let share = (usable * 100).checked_div(g.counted).unwrap_or(0);
                total < 100 && !g.all.is_empty() && share < c.panic_threshold as usize
            })
            .collect();
        let mut loads = vec![0u64; able.len()];
        if total > 0 {
            let mut left = 100;
            for (load, h) in loads.iter_mut().zip(&able) {
                *load = (h * 100).checked_div(total).unwrap_or(0).min(left);
                left -= *load;
            }
            // Rounding leaves a few percent; they go to the first priority that takes load.
            if let Some(first) = loads.iter_mut().find(|l| **l > 0) {
                *first += left;
            }
        } else if c.panic_threshold > 0 {
            let all: u64 = groups.iter().map(|g| g.all.len() as u64).sum();
            for ((load, panic), g) in loads.iter_mut().zip(&mut panics).zip(&groups) {
                *load = (g.all.len() as u64 * 100).div_ceil(all.max(1));
                *panic = !g.all.is_empty();
            }
        }
        let table = |load: u64, able: u64, level: usize, group: &Group, chosen: &[Arc<Host>]| {
            let tables: Vec<(u64, Table)> = if c.locality_weighted {
                (0..locality_weights.len())
                    .filter_map(|l| {
                        let mine: Vec<_> = chosen.iter().filter(|h| h.locality == l).cloned().collect();
                        let of = group.all.iter().filter(|h| h.locality == l && counts(h)).count();
                        // In a panic also hosts that count for nothing.
                        let weight = u64::from(locality_weights[l]) * health(mine.len(), of.max(1));
                        (!mine.is_empty() && weight > 0).then(|| (weight, Table::new(mine, &c, seed)))
                    })
                    .collect()
            } else if chosen.is_empty() {
                vec![]
            } else {
                vec![(1, Table::new(chosen.to_vec(), &c, seed))]
            };
            let total = tables.iter().map(|t| t.0).sum();
            Priority { load, level: u32::try_from(level).unwrap_or(u32::MAX), able, tables, total }
        };
        let mut priorities = Vec::with_capacity(groups.len());
        for (i, g) in groups.iter().enumerate() {
            let degraded = loads[groups.len() + i];
            if panics[i] {
                priorities.push(table(loads[i] + degraded, able[i], i, g, &g.all));
                continue;
            }
            priorities.push(table(loads[i], able[i], i, g, &g.healthy));
            if degraded > 0 {
                priorities.push(table(degraded, able[groups.len() + i], i, g, &g.degraded));
            }
        }
        let slots = slots(&hosts);
        Self { hosts, priorities, slots }
    }

    /// Picks a host of the slot that a session asks for by its server name: the one with the fewest sessions. `None`
    /// if there is no such slot, or only hosts of it that are in `avoid`: then any host will do.
    pub(crate) fn pick_slot(
        &self,
        rng: &Rng,
        server_name: Option<&str>,
        avoid: &[u64],
    ) -> Option<&Arc<Host>> {
        let slot = slot_of(server_name.filter(|_| !self.slots.is_empty())?)?;
        let at = self.slots.binary_search_by_key(&slot, |(s, _)| *s).ok()?;
        let (_, of_slot) = self.slots.get(at)?;
        // Where the search begins decides among equals.
        let start = (rng.next() % of_slot.len().max(1) as u64) as usize;
        let (after, before) = of_slot.split_at(start);
        before
            .iter()
            .chain(after)
            .filter(|h| h.is_usable() && !avoid.contains(&h.stats.id))
            .min_by_key(|h| h.stats.active.load(Relaxed))
    }

    /// Picks a host; with `hash`, the same one for the same hash.
    pub(crate) fn pick(&self, rng: &Rng, hash: Option<u64>) -> Option<&Arc<Host>> {
        let priority = match self.priorities.as_slice() {
            [] => return None,
            [only] => only,
            several => {
                let sum: u64 = several.iter().map(|p| p.load).sum();
                if sum == 0 {
                    return None;
                }
                let mut at = hash.unwrap_or_else(|| rng.next()) % sum;
                several.iter().find(|p| {
                    if at < p.load {
                        return true;
                    }
                    at -= p.load;
                    false
                })?
            }
        };
        priority.pick(rng, hash)
    }

    /// Picks, and picks again, as if these priorities had no hosts; if that leaves none, as ever.
    pub(crate) fn pick_elsewhere(
        &self,
        rng: &Rng,
        leave: &[u32],
        avoid: &[u64],
        attempts: u32,
    ) -> Option<&Arc<Host>> {
        let able = |p: &Priority| if leave.contains(&p.level) || p.tables.is_empty() { 0 } else { p.able };
        let total: u64 = self.priorities.iter().map(able).sum::<u64>().min(100);
        if total == 0 {
            return self.pick_avoiding(rng, None, avoid, attempts);
        }
        let once = || {
            let (mut at, mut left) = (rng.next() % 100, 100);
            let mut first = None;
            for p in self.priorities.iter().filter(|p| able(p) > 0) {
                let load = (able(p) * 100 / total).min(left);
                if at < load {
                    return p.pick(rng, None);
                }
                at -= load;
                left -= load;
                first = first.or(Some(p));
            }
            // What rounding leaves is the first one's, as above.
            first?.pick(rng, None)
        };
        let mut host = once()?;
        for _ in 0..attempts {
            if !avoid.contains(&host.stats.id) {
                break;
            }
            host = once()?;
        }
        Some(host)
    }

    /// Picks, and picks again up to `attempts` times while the host is one of `avoid`.
    pub(crate) fn pick_avoiding(
        &self,
        rng: &Rng,
        hash: Option<u64>,
        avoid: &[u64],
        attempts: u32,
    ) -> Option<&Arc<Host>> {
        let mut host = self.pick(rng, hash)?;
        if hash.is_none() {
            for _ in 0..attempts {
                if !avoid.contains(&host.stats.id) {
                    break;
                }
                host = self.pick(rng, None)?;
            }
        }
        Some(host)
    }

    /// Picks a host that is none of `tried`, if any host that gets traffic is none of them; `None` if all are. Chance
    /// decides for as long as it finds one.
    pub(crate) fn pick_untried(&self, rng: &Rng, hash: Option<u64>, tried: &[u64]) -> Option<&Arc<Host>> {
        let is_new = |h: &&Arc<Host>| !tried.contains(&h.stats.id);
        let picked = self.pick_avoiding(rng, hash.filter(|_| tried.is_empty()), tried, UNTRIED_PICKS)?;
        Some(picked).filter(is_new).or_else(|| {
            let loaded = self.priorities.iter().filter(|p| p.load > 0);
            loaded.flat_map(|p| &p.tables).flat_map(|(_, t)| &t.hosts).find(is_new)
        })
    }
}

#[cfg(test)]
#[path = "lb/tests.rs"]
mod tests;
