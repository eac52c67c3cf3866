"""谁可以做什么：NATS 的用户与 PostgreSQL 的角色，各有自己那一点权限。"""
