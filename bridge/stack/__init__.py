"""内嵌的本地栈：PostgreSQL、NATS、Dagster 的网页与守护进程、监听者、工人，由一个监督者看着。"""
