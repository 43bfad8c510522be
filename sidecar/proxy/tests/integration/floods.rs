//! What costs a client little and could cost a proxy much. Each attack must meet a limit or back-pressure, memory
//! stays bounded, and another client is served meanwhile.

use std::time::Duration;

use tokio::io::AsyncWriteExt as _;

use crate::{
    refusals::raw_h2::{self as h2, RawH2},
    support::*,
};

/// Resident memory of this process, in MiB. Other tests run beside, so limits are generous; each attack would
/// take several hundred.
fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() / 256
}

const GENEROUS: usize = 96;

fn head(path: &str) -> Vec<u8> {
    h2::block(&[
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path.as_bytes()),
        (b":authority", b"a"),
    ])
}

/// Sends pieces for at most a moment, without reading; the peer may stop reading or close.
async fn flood(c: &mut RawH2, piece: &[u8], times: usize) -> usize {
    for n in 0..times {
        match tokio::time::timeout(Duration::from_millis(500), c.send(piece)).await {
            Ok(true) => {}
            // Back-pressure, or closed.
            Ok(false) | Err(_) => return n,
        }
    }
    times
}

async fn still_serves(p: &Proxy) {
    let r = p.get("a", "/name").await;
    assert_eq!((r.status, r.body.as_str()), (200, "up"), "{r:?}");
}

async fn nothing_in_flight(p: &Proxy) {
    let end = tokio::time::Instant::now() + WAIT;
    while p.engine.status().requests > 0 {
        assert!(tokio::time::Instant::now() < end, "{:?}", p.engine.status());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn rapid_reset_is_told_to_calm_down() {
    let up = Upstream::new("up").await;
    let p = simple(up.address).run();
    let mut c = RawH2::open(p.address("l")).await;
    let block = head("/slow");
    let mut sent = 0;
    for i in 0..20_000u32 {
        let mut raw = h2::frame(h2::HEADERS, h2::END_HEADERS, i * 2 + 1, &block);
        raw.extend(h2::frame(h2::RST_STREAM, 0, i * 2 + 1, &8u32.to_be_bytes()));
        if !c.send(&raw).await {
            break;
        }
        sent += 1;
    }
    let outcome = c.outcome(u32::MAX, WAIT).await;
    assert_eq!(outcome.name(), "GOAWAY ENHANCE_YOUR_CALM", "after {sent}");
    still_serves(&p).await;
    nothing_in_flight(&p).await;
    println!("  rapid reset: {} of 20,000 reached the router", p.engine.status().requests_total);
    assert!(p.engine.status().requests_total < 2_000, "{:?}", p.engine.status());
}

/// A client that waits until its request is being served before it takes it back stays below the limit on
/// streams that nobody has accepted, so it is judged by how many it abandons.
#[tokio::test]
async fn slow_rapid_reset_is_told_to_calm_down_too() {
    let up = Upstream::new("up").await;
    let p = simple(up.address).run();
    let mut c = RawH2::open(p.address("l")).await;
    let block = head("/slow");
    let mut open = true;
    for i in 0..2_000u32 {
        let before = p.engine.status().requests_total;
        open &= c.send(&h2::frame(h2::HEADERS, h2::END_HEADERS, i * 2 + 1, &block)).await;
        let end = tokio::time::Instant::now() + Duration::from_millis(200);
        while p.engine.status().requests_total == before && tokio::time::Instant::now() < end && open {
            tokio::time::sleep(Duration::from_micros(200)).await;
        }
        open &= c.send(&h2::frame(h2::RST_STREAM, 0, i * 2 + 1, &8u32.to_be_bytes())).await;
        if !open || p.engine.status().requests_total == before {
            break;
        }
    }
    let total = p.engine.status().requests_total;
    assert_eq!(c.outcome(u32::MAX, WAIT).await.name(), "GOAWAY ENHANCE_YOUR_CALM", "after {total}");
    assert!((400..1000).contains(&total), "{total}");
    still_serves(&p).await;
    nothing_in_flight(&p).await;
}

#[tokio::test]
async fn continuation_flood() {
    let up = Upstream::new("up").await;
    let p = simple(up.address).run();
    let before = resident();
    let mut c = RawH2::open(p.address("l")).await;
    c.send(&h2::frame(h2::HEADERS, 0, 1, &head("/"))).await;
    let mut field = Vec::new();
    h2::literal(b"x", &[b'a'; 4000], &mut field);
    flood(&mut c, &h2::frame(h2::CONTINUATION, 0, 1, &field), 100_000).await;
    assert_eq!(c.outcome(1, WAIT).await.name(), "GOAWAY ENHANCE_YOUR_CALM");
    // Empty ones.
    let mut c = RawH2::open(p.address("l")).await;
    c.send(&h2::frame(h2::HEADERS, 0, 1, &head("/"))).await;
    flood(&mut c, &h2::frame(h2::CONTINUATION, 0, 1, &[]), 100_000).await;
    assert_eq!(c.outcome(1, WAIT).await.name(), "GOAWAY ENHANCE_YOUR_CALM");
    still_serves(&p).await;
    assert!(resident() < before + GENEROUS, "{before} {}", resident());
    assert_eq!(up.requests(), 1);
}

#[tokio::test]
async fn hpack_bomb() {
    let up = Upstream::new("up").await;
    let p = simple(up.address).run();
    let before = resident();
    // A field of 3.9 kB enters the table; each further byte repeats it.
    let mut block = head("/");
    h2::indexed(b"x", &[b'a'; 3900], &mut block);
    block.extend([0xbe; 12_000]);
    let mut clients = Vec::new();
    for _ in 0..10 {
        let mut c = RawH2::open(p.address("l")).await;
        for i in 0..10u32 {
            c.send(&h2::frame(h2::HEADERS, h2::END_HEADERS | h2::END_STREAM, i * 2 + 1, &block)).await;
        }
        clients.push(c);
    }
    for c in &mut clients {
        assert_eq!(c.outcome(1, WAIT).await.name(), "GOAWAY ENHANCE_YOUR_CALM");
    }
    still_serves(&p).await;
    assert!(resident() < before + GENEROUS, "{before} {}", resident());
    assert_eq!(up.requests(), 1);
}

#[tokio::test]
async fn control_frames_that_ask_for_answers_meet_back_pressure() {
    let up = Upstream::new("up").await;
    let p = simple(up.address).run();
    let before = resident();
    for frame in [h2::frame(h2::PING, 0, 0, &[7; 8]), h2::frame(h2::SETTINGS, 0, 0, &[0, 4, 0, 1, 0, 0])] {
        // Their answers are never read: an endpoint that queued them would grow without end.
        let mut c = RawH2::open(p.address("l")).await;
        let many: Vec<u8> = frame.iter().copied().cycle().take(frame.len() * 1000).collect();
        let sent = flood(&mut c, &many, 20_000).await;
        println!("  frames of kind {}: {sent},000 taken", frame[3]);
        assert!(sent < 20_000, "no back-pressure");
        still_serves(&p).await;
    }
    assert!(resident() < before + GENEROUS, "{before} {}", resident());
}

#[tokio::test]
async fn frames_that_mean_nothing() {
    let up = Upstream::new("up").await;
    let p = simple(up.address).run();
    let before = resident();
    let mut c = RawH2::open(p.address("l")).await;
    c.send(&h2::frame(h2::HEADERS, h2::END_HEADERS, 1, &head("/slow"))).await;
    let frames = [
        h2::frame(h2::DATA, 0, 1, &[]),
        // Padding alone: flow-controlled, and given back.
        h2::frame(h2::DATA, 8, 1, &[3, 0, 0, 0]),
        h2::frame(h2::PRIORITY, 0, 3, &[0, 0, 0, 1, 9]),
        // An unknown kind.
        h2::frame(0xfa, 0, 1, &[0; 16]),
    ];
    for frame in frames {
        let many: Vec<u8> = frame.iter().copied().cycle().take(frame.len() * 1000).collect();
        flood(&mut c, &many, 300).await;
        still_serves(&p).await;
    }
    assert!(resident() < before + GENEROUS, "{before} {}", resident());
}

#[tokio::test]
async fn one_byte_frames_to_a_server_that_does_not_read() {
    let up = Upstream::new("up").await;
    let p = simple(up.address).run();
    let before = resident();
    let mut clients = Vec::new();
    for _ in 0..4 {
        let mut c = RawH2::open(p.address("l")).await;
        let one: Vec<u8> = h2::frame(h2::DATA, 0, 1, b"x").into_iter().cycle().take(10_000).collect();
        c.send(&h2::frame(h2::HEADERS, h2::END_HEADERS, 1, &head("/slow"))).await;
        flood(&mut c, &one, 400).await;
        clients.push(c);
    }
    still_serves(&p).await;
    assert!(resident() < before + GENEROUS, "{before} {}", resident());
}

#[tokio::test]
async fn slow_heads_and_silent_clients_cost_a_place_and_no_more() {
    let up = Upstream::new("up").await;
    let mut m = inline(vec![vhost(&["*"], vec![route(forward("up"))])]);
    m.request_headers_timeout = Some(Duration::from_millis(300));
    let p = Proxy::new()
        .cluster(cluster("up", &[up.address]))
        .listener(listener(mesh_model::proxy::Direction::Outbound, vec![http_chain(m)]))
        .run();
    // A byte now and then does not move the deadline.
    let mut slow = Vec::new();
    for _ in 0..50 {
        let mut s = p.connect("l").await;
        s.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
        slow.push(s);
    }
    let begun = std::time::Instant::now();
    let mut open = slow.len();
    while open > 0 {
        assert!(begun.elapsed() < WAIT, "{open} slow clients are still served");
        open = 0;
        for s in &mut slow {
            open += usize::from(s.write_all(b"X").await.is_ok());
        }
        still_serves(&p).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
