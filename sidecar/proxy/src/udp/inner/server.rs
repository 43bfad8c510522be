//! The workload's end.

use std::{
    cell::RefCell,
    collections::HashMap,
    rc::{Rc, Weak},
    sync::Arc,
    time::Instant,
};

use mesh_model::flow::{self, Frame};
use mesh_telemetry::metrics::{UdpDrop, UdpEnd};
use quinn::Connection as Quic;

use super::{DENIED, LEAVING};
use crate::{
    config::listener::UdpProxy,
    udp::{
        SWEEP,
        carrier::Carrier,
        session::{Client, Key, Session},
    },
    worker::connection::Connection,
};

/// Sessions of one connection; the worker's limit holds as well.
const FLOWS: usize = 4096;

/// A connection that a chain has let in.
struct Served {
    quic: Quic,
    conn: Rc<Connection>,
    proxy: Arc<UdpProxy>,
    flows: RefCell<HashMap<u64, Rc<Session>>>,
}

/// The way back to the caller's session.
struct Answers {
    quic: Quic,
    id: u64,
}

impl Carrier for Answers {
    fn send(&self, data: &[u8]) -> Result<(), UdpDrop> {
        super::transmit(&self.quic, self.id, data)
    }
}

/// Tells a caller that it is not let in.
pub(crate) fn deny(quic: &Quic) {
    quic.close(DENIED, b"RBAC: access denied");
}

/// Serves datagrams of a connection until it ends.
pub(crate) async fn serve(quic: Quic, conn: Rc<Connection>, proxy: Arc<UdpProxy>) {
    let signals = conn.signals.subscribe();
    let served = Rc::new(Served { quic, conn, proxy, flows: RefCell::default() });
    let mut sweep = tokio::time::interval(SWEEP);
    sweep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let why = loop {
        let idle = served.flows.borrow().is_empty();
        tokio::select! {
            d = served.quic.read_datagram() => match d {
                Ok(d) => served.take(&d),
                Err(_) => break UdpEnd::ConnectionLost,
            },
            s = served.quic.accept_uni() => match s {
                Ok(stream) => {
                    let served = Rc::clone(&served);
                    tokio::task::spawn_local(async move {
                        if let Some(d) = super::read(stream).await {
                            served.take(&d);
                        }
                    });
                }
                Err(_) => break UdpEnd::ConnectionLost,
            },
            _ = sweep.tick(), if !idle => served.sweep(),
            // What follows begins anew, under the rules that hold then; nothing is lost by that but what is on its way.
            () = signals.drained() => {
                served.quic.close(LEAVING, b"drained");
                break UdpEnd::Reconfigured;
            }
        }
    };
    for s in served.flows.take().into_values() {
        s.end(why);
    }
}

impl Served {
    fn take(&self, frame: &[u8]) {
        let now = Instant::now();
        let worker = &self.conn.worker;
        let series = self.proxy.series(&worker.shared.metrics);
        let (id, data) = match flow::read(frame) {
            Some(Frame::Data(id, data)) => (id, data),
            Some(Frame::End(id)) => {
                if let Some(s) = self.flows.borrow_mut().remove(&id) {
                    s.end(UdpEnd::Idle);
                }
                return;
            }
            None => return series.dropped(UdpDrop::NotQuic),
        };
        let known = self.flows.borrow().get(&id).cloned();
        if let Some(s) = known {
            if s.check().is_ok() {
                return s.forward(data, now);
            }
            self.flows.borrow_mut().remove(&id);
            s.end(UdpEnd::HostGone);
        }
        if self.flows.borrow().len() >= FLOWS {
            return series.dropped(UdpDrop::SessionLimit);
        }
        match self.open(id, now) {
            Ok(s) => {
                s.forward(data, now);
                self.flows.borrow_mut().insert(id, s);
            }
            Err(why) => series.dropped(why),
        }
    }

    fn open(&self, id: u64, now: Instant) -> Result<Rc<Session>, UdpDrop> {
        let worker = &self.conn.worker;
        let cluster = self.proxy.cluster.load().ok_or(UdpDrop::NoCluster)?;
        let host = cluster.tables().pick(&worker.rng, None).cloned().ok_or(UdpDrop::NoHost)?;
        let client = Client::Carried(Rc::new(Answers { quic: self.quic.clone(), id }));
        let key = Key { peer: self.conn.peer, local: self.conn.local, host: id };
        Session::open(worker, &self.proxy, client, Weak::new(), key, &cluster, host, now)
    }

    fn sweep(&self) {
        let now = Instant::now();
        let mut ended = Vec::new();
        self.flows.borrow_mut().retain(|id, s| {
            let why = match s.check() {
                Err(why) => why,
                Ok(()) if s.is_idle(now) => UdpEnd::Idle,
                Ok(()) => return true,
            };
            ended.push((*id, Rc::clone(s), why));
            false
        });
        for (id, s, why) in ended {
            s.end(why);
            let _ = self.quic.send_datagram(flow::end(id).into());
        }
    }
}
