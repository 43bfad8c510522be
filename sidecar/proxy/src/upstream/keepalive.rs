//! HTTP/2 keep-alive (`connection_keepalive`): a PING from time to time, and the end of a connection that answers
//! nothing.

use std::{future::poll_fn, rc::Rc};

use h2::{Ping, PingPong};
use mesh_model::proxy::Http2Keepalive;
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};

use super::{pool::H2Conn, silence::Link};

/// Percent of the interval by which it may be longer, so that connections of one moment are not asked at one moment.
/// Envoy's default.
const JITTER: u32 = 15;

/// What a connection is kept alive by.
pub(super) struct Keep {
    pub(super) times: Http2Keepalive,
    /// Ends the connection.
    pub(super) end: Rc<Notify>,
}

/// Waits until it is time to ask; for good where nobody is to be asked.
pub(super) async fn pause(keep: Option<&Keep>) {
    match keep {
        Some(k) => sleep(k.times.interval + k.times.interval * rand::random_range(0..=JITTER) / 100).await,
        None => std::future::pending().await,
    }
}

/// Asks for as long as the connection is there.
pub(super) fn watch(conn: &Rc<H2Conn>, link: &Rc<Link>, mut pings: PingPong, keep: Keep) {
    let (conn, link) = (Rc::downgrade(conn), Rc::downgrade(link));
    tokio::task::spawn_local(async move {
        loop {
            pause(Some(&keep)).await;
            if conn.strong_count() == 0 || pings.send_ping(Ping::opaque()).is_err() {
                return;
            }
            loop {
                let heard = link.upgrade().map(|l| l.count());
                match timeout(keep.times.timeout, poll_fn(|cx| pings.poll_pong(cx))).await {
                    Ok(Ok(_)) => break,
                    Ok(Err(_)) => return,
                    // Whatever comes shows that the server is there; its answer may be behind much else.
                    Err(_) if link.upgrade().map(|l| l.count()) != heard => {}
                    Err(_) => {
                        if let Some(c) = conn.upgrade() {
                            c.retire();
                        }
                        return keep.end.notify_one();
                    }
                }
            }
        }
    });
}
