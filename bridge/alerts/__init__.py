"""什么不对，说给谁听：`etl status` 的第一行与 webhook 收到的，是同一件事。"""
