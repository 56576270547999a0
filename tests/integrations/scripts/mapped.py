from datasets import load_dataset
from peft import LoraConfig
from rewards_of_mine import right
from trl import GRPOConfig, GRPOTrainer

SYSTEM = "Answer with a number."


def make_conversation(example):
    return {"prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": example["question"]}]}


dataset = load_dataset("json", data_files="questions.jsonl", split="train").map(make_conversation)
dataset = dataset.filter(lambda row: len(row["question"]) < 50)

training_args = GRPOConfig(
    output_dir="out",
    per_device_train_batch_size=8,
    num_generations=8,
    gradient_accumulation_steps=4,
    lr_scheduler_type="cosine",
    max_completion_length=12,
)
trainer = GRPOTrainer(
    model="./model",
    args=training_args,
    reward_funcs=[right],
    train_dataset=dataset,
    peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
)

if __name__ == "__main__":
    trainer.train()
