"""Turns at a worker: who has kept it for the shortest time is next, whatever others have sent."""

import asyncio

from insitu.server.engines.turns import Turns


def test_a_tenant_that_sends_much_waits_for_itself() -> None:
    async def taken() -> list[str]:
        turns, order = Turns(["worker"]), list[str]()

        async def use(tenant: str) -> None:
            worker = await turns.get(tenant)
            order.append(tenant)
            await asyncio.sleep(0)
            turns.put(worker, tenant, 1.0)

        busy = [asyncio.create_task(use("ada")) for _ in range(20)]
        await asyncio.sleep(0)
        other = asyncio.create_task(use("bob"))
        await asyncio.gather(*busy, other)
        return order

    order = asyncio.run(taken())
    assert sorted(order) == ["ada"] * 20 + ["bob"]
    assert order.index("bob") <= 3  # behind those that had begun before it came, and not all


def test_who_waits_no_longer_keeps_nobody_waiting() -> None:
    async def taken() -> str:
        turns = Turns(["worker"])
        worker = await turns.get("ada")
        gone = asyncio.create_task(turns.get("bob"))
        stays = asyncio.create_task(turns.get("cid"))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        turns.put(worker, "ada", 1.0)
        return await asyncio.wait_for(stays, 5)

    assert asyncio.run(taken()) == "worker"
