"""`etl why`：一行从哪里来。answers 在数据库里找，elsewhere 补上 NATS 与 Dagster 知道的。"""
