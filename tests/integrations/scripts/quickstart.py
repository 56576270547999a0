# As TRL's own quickstart: no GRPOConfig at all.
from datasets import load_dataset
from rewards_of_mine import right
from trl import GRPOTrainer

dataset = load_dataset("json", data_files="chat.jsonl", split="train")

trainer = GRPOTrainer(
    model="./model",
    reward_funcs=right,
    train_dataset=dataset,
)

if __name__ == "__main__":
    trainer.train()
